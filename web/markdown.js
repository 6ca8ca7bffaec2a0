// Markdown to DOM nodes. Nothing here makes HTML of the text: nodes are created one by one and text goes into text
// nodes, so no text of a model can become markup. Addresses other than http(s) stay text; images become links (the page
// loads nothing from elsewhere). Both passes are linear in the text, nesting is bounded.

import {copyButton, h} from './dom.js';
import {highlight} from './highlight.js';
import {t} from './i18n.js';

const MAX_DEPTH = 8, MAX_OPEN = 16;  // nested blocks; nested emphasis
const FENCE = /^( {0,3})(`{3,}|~{3,})([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})\s(.*)$/;
const RULE = /^ {0,3}([-*_])(?:[ \t]*\1){2,}[ \t]*$/;
const QUOTE = /^ {0,3}> ?(.*)$/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])(?:( {1,4})(?! )|(?= {5,})( )|$)(.*)$/;

const indentOf = (line) => line.length - line.trimStart().length;
const startsBlock = (line) => FENCE.test(line) || HEADING.test(line) || RULE.test(line) || QUOTE.test(line);

function cells(line) {
  const out = [];
  let cell = '', code = false;
  const row = line.trim().replace(/^\|/, '').replace(/\|$/, ''), lastTick = row.lastIndexOf('`');
  for (let i = 0; i < row.length; i++) {
    if (row[i] === '\\' && row[i + 1] === '|') { cell += '|'; i++; continue; }
    if (row[i] === '`') code = !code;
    if (row[i] === '|' && !(code && i < lastTick)) { out.push(cell.trim()); cell = ''; continue; }
    cell += row[i];
  }
  out.push(cell.trim());
  return out;
}

// Whether lines[i + 1] is the rule below a table's head.
function tableAt(lines, i) {
  const rule = lines[i + 1];
  return lines[i].includes('|') && rule !== undefined && rule.includes('-') && /^[\s|:-]+$/.test(rule) &&
    cells(rule).every((cell) => /^:?-+:?$/.test(cell));
}

// One list from lines[i] on; returns the line after it.
function readList(lines, i, out) {
  const first = ITEM.exec(lines[i]);
  const ordered = /\d/.test(first[2]), base = first[1].length, start = i;
  const items = [];
  while (i < lines.length) {
    const mark = ITEM.exec(lines[i]);
    if (!mark || mark[1].length > base + 1 || /\d/.test(mark[2]) !== ordered || RULE.test(lines[i])) break;
    const inner = mark[1].length + mark[2].length + (mark[3] || mark[4] || ' ').length;
    const body = [mark[5]];
    let blank = false;
    for (i++; i < lines.length; i++) {
      const line = lines[i], indent = indentOf(line);
      if (!line.trim()) { blank = true; body.push(''); continue; }
      const nested = indent >= inner || (indent > mark[1].length + 1 && ITEM.test(line));
      if (!nested && (blank || ITEM.test(line) || startsBlock(line))) break;
      body.push(line.slice(Math.min(indent, inner)));
      blank = false;
    }
    const task = /^\[([ xX])\]\s+/.exec(body[0]);
    if (task) body[0] = body[0].slice(task[0].length);
    items.push({text: body.join('\n').trimEnd(), done: task ? task[1] !== ' ' : null});
  }
  out.push({type: 'list', ordered, start: ordered ? parseInt(first[2], 10) : 1, items,
            raw: lines.slice(start, i).join('\n')});
  return i;
}

// The text's blocks: {type, raw, ...}. `raw` is what the block was made of; equal raw and type means an equal block.
export function parseBlocks(text) {
  const lines = text.replace(/\r\n?/g, '\n').replace(/\t/g, '    ').split('\n');
  const out = [];
  let i = 0;
  while (i < lines.length) {
    const line = lines[i], start = i;
    const add = (block) => out.push({...block, raw: lines.slice(start, i).join('\n')});
    let match;
    if (!line.trim()) {
      i++;
    } else if ((match = FENCE.exec(line))) {
      const [, indent, fence, info] = match;
      const close = new RegExp(`^ {0,3}\\${fence[0]}{${Math.min(fence.length, 100)},}\\s*$`);
      const code = [];
      for (i++; i < lines.length && !close.test(lines[i]); i++) {
        code.push(lines[i].slice(Math.min(indent.length, indentOf(lines[i]))));
      }
      const closed = i < lines.length;
      i = Math.min(i + 1, lines.length);
      add({type: 'code', language: info.trim().split(/\s/)[0].slice(0, 30), text: code.join('\n'), closed});
    } else if ((match = HEADING.exec(line))) {
      i++;
      add({type: 'heading', level: match[1].length, text: match[2].trim().replace(/(^|\s)#+$/, '')});
    } else if (RULE.test(line)) {
      i++;
      add({type: 'rule'});
    } else if (QUOTE.test(line)) {
      const body = [];
      for (; i < lines.length && (match = QUOTE.exec(lines[i])); i++) body.push(match[1]);
      add({type: 'quote', text: body.join('\n')});
    } else if (ITEM.test(line) && indentOf(line) < 4) {
      i = readList(lines, i, out);
    } else if (tableAt(lines, i) && cells(line).length === cells(lines[i + 1]).length) {
      const head = cells(line);
      const align = cells(lines[i + 1]).map((c) => (c.endsWith(':') ? (c.startsWith(':') ? 'center' : 'right') : ''));
      const rows = [];
      for (i += 2; i < lines.length && lines[i].trim() && lines[i].includes('|'); i++) {
        rows.push(cells(lines[i]).slice(0, head.length));
      }
      add({type: 'table', head, align, rows});
    } else {
      for (i++; i < lines.length && lines[i].trim() && !startsBlock(lines[i]) && !tableAt(lines, i) &&
           !/^ *(?:[-*+]|1[.)]) +\S/.test(lines[i]); i++);
      add({type: 'text', text: lines.slice(start, i).map((l) => l.trim()).join('\n')});
    }
  }
  return out;
}

export function safeUrl(text) {
  try {
    const url = new URL(text);
    return url.protocol === 'http:' || url.protocol === 'https:' ? url.href : '';
  } catch {
    return '';
  }
}

const link = (href, ...content) => h('a', {href, target: '_blank', rel: 'noopener noreferrer nofollow'}, ...content);

const SPECIAL = /[\\`*_~[!<\n]|https?:\/\//g;
const LINK = /!?\[((?:[^[\]\\\n]|\\.){0,500})\]\(\s{0,8}<?([^\s()<>]{0,1000}(?:\([^\s()]{0,200}\)[^\s()<>]{0,200}){0,4})>?(?:\s{1,8}["'][^"'\n]{0,200}["'])?\s{0,8}\)/y;
const AUTO = /<(https?:\/\/[^\s<>]{1,2000})>/y;
const BARE = /https?:\/\/[^\s<>"'`，。；：！？、（）《》「」]{1,2000}/y;
const PUNCTUATION = /[!-/:-@[-`{-~]/;
const SPACE = /\s/;

function at(pattern, text, index) {
  pattern.lastIndex = index;
  return pattern.exec(text);
}

// Wraps what stands between delimiter runs. `items`: nodes, strings and {mark, n, opens, closes}.
function emphasis(items) {
  const out = [], open = {'*': 0, _: 0, '~': 0}, stack = [];
  const drop = () => {  // the innermost open run stays text
    const run = stack.pop();
    open[run.mark]--;
    out[run.index] = run.mark.repeat(run.n);
  };
  for (const item of items) {
    if (typeof item === 'string' || item instanceof Node) { out.push(item); continue; }
    let n = item.n;
    while (item.closes && n > 0 && open[item.mark] > 0) {
      while (stack[stack.length - 1].mark !== item.mark) drop();
      const run = stack[stack.length - 1];
      const use = Math.min(run.n, n) >= 2 ? 2 : 1;
      if (item.mark === '~' && use === 1) break;
      const tag = item.mark === '~' ? 'del' : use === 2 ? 'strong' : 'em';
      const inside = out.splice(run.index + 1);
      out.push(h(tag, null, ...inside));
      run.n -= use;
      n -= use;
      if (run.n === 0) { stack.pop(); open[run.mark]--; out[run.index] = ''; }
    }
    if (n === 0) continue;
    if (item.opens && stack.length < MAX_OPEN) {
      stack.push({mark: item.mark, n, index: out.length});
      open[item.mark]++;
      out.push('');
    } else {
      out.push(item.mark.repeat(n));
    }
  }
  while (stack.length) drop();
  return out;
}

// Inline text to nodes and strings.
export function inline(text, depth = 0) {
  const items = [];
  let plain = '', i = 0;
  const push = (item) => {
    if (plain) { items.push(plain); plain = ''; }
    items.push(item);
  };
  while (i < text.length) {
    SPECIAL.lastIndex = i;
    const next = SPECIAL.exec(text);
    const stop = next ? next.index : text.length;
    plain += text.slice(i, stop);
    i = stop;
    if (!next) break;
    const c = text[i];
    let match;
    if (c === '\\' && PUNCTUATION.test(text[i + 1] || '')) {
      plain += text[i + 1];
      i += 2;
    } else if (c === '\n') {
      push(h('br'));
      i++;
    } else if (c === '`') {
      let n = 1;
      while (text[i + n] === '`') n++;
      const close = at(new RegExp(`(?<!\`)\`{${n}}(?!\`)`, 'g'), text, i + n);
      if (close) {
        const body = text.slice(i + n, close.index).replace(/\n/g, ' ');
        push(h('code', null, body.startsWith(' ') && body.endsWith(' ') && body.trim() ? body.slice(1, -1) : body));
        i = close.index + n;
      } else {
        plain += text.slice(i, i + n);
        i += n;
      }
    } else if ((c === '[' || (c === '!' && text[i + 1] === '[')) && (match = at(LINK, text, i))) {
      const href = safeUrl(match[2]);
      const label = match[1] || match[2];
      if (href) push(link(href, ...(depth < 2 ? inline(label, depth + 2) : [label])));
      else plain += match[0];
      i += match[0].length;
    } else if (c === '<' && (match = at(AUTO, text, i)) && safeUrl(match[1])) {
      push(link(safeUrl(match[1]), match[1]));
      i += match[0].length;
    } else if (c === 'h' && depth < 2 && (match = at(BARE, text, i))) {
      let url = match[0].replace(/[.,;:!?*_~]+$/, '');
      while (/[)\]]$/.test(url) && !/[([]/.test(url)) url = url.slice(0, -1);
      const href = safeUrl(url);
      if (href) push(link(href, url));
      else plain += url;
      i += url.length;
    } else if (c === '*' || c === '_' || c === '~') {
      let n = 1;
      while (text[i + n] === c) n++;
      const before = text[i - 1] || ' ', after = text[i + n] || ' ';
      let opens = !SPACE.test(after), closes = !SPACE.test(before);
      if (c === '_') {
        const word = /[\p{L}\p{N}]/u;
        opens = opens && !word.test(before);
        closes = closes && !word.test(after);
      }
      if ((opens || closes) && n <= 3 && !(c === '~' && n !== 2)) push({mark: c, n, opens, closes});
      else plain += c.repeat(n);
      i += n;
    } else {
      plain += c;
      i++;
    }
  }
  if (plain) items.push(plain);
  return emphasis(items);
}

function codeBlock(block) {
  const code = h('code', null, ...(block.closed ? highlight(block.text, block.language) : [block.text]));
  return h('figure', {class: 'code'},
           h('figcaption', null, h('span', null, block.language || t('code')),
             copyButton(t('copyCode'), t('copied'), () => code.textContent)),
           h('pre', {tabindex: '0', 'aria-label': t('code')}, code));
}

function render(block, depth) {
  switch (block.type) {
    case 'code': return codeBlock(block);
    case 'heading': return h('h' + Math.min(block.level + 2, 6), {class: 'h' + block.level}, ...inline(block.text));
    case 'rule': return h('hr');
    case 'quote': return h('blockquote', null, ...renderAll(block.text, depth + 1));
    case 'list': {
      const items = block.items.map((item) => {
        const body = renderAll(item.text, depth + 1);
        const tight = body.length && body[0].tagName === 'P' ? [...body[0].childNodes, ...body.slice(1)] : body;
        if (item.done === null) return h('li', null, ...tight);
        return h('li', {class: 'task'}, h('input', {type: 'checkbox', checked: item.done, disabled: true,
                                                    'aria-label': t(item.done ? 'done' : 'notDone')}), ...tight);
      });
      return block.ordered ? h('ol', {start: block.start}, ...items) : h('ul', null, ...items);
    }
    case 'table': {
      const row = (tag, texts) => h('tr', null, ...block.head.map((_, i) => h(tag, {class: block.align[i] || null},
                                                                              ...inline(texts[i] || ''))));
      return h('div', {class: 'table', tabindex: '0', role: 'group', 'aria-label': t('table')},
               h('table', null, h('thead', null, row('th', block.head)),
                 h('tbody', null, ...block.rows.map((texts) => row('td', texts)))));
    }
    default: return h('p', null, ...inline(block.text));
  }
}

function renderAll(text, depth) {
  if (depth > MAX_DEPTH) return [h('p', null, text)];
  return parseBlocks(text).map((block) => render(block, depth));
}

// Shows `text` in `root`; blocks that did not change since the last call keep their nodes (and selections in them).
export function showMarkdown(root, text) {
  const blocks = parseBlocks(text), old = root.blocks || [];
  let same = 0;
  while (same < blocks.length && same < old.length && blocks[same].raw === old[same].raw &&
         blocks[same].type === old[same].type && blocks[same].closed === old[same].closed) same++;
  const grown = blocks[same], was = old[same];
  if (grown && was && grown.type === 'code' && was.type === 'code' && !grown.closed && !was.closed &&
      grown.language === was.language && same === blocks.length - 1) {  // code being written keeps its scroll position
    root.childNodes[same].querySelector('code').textContent = grown.text;
    same++;
  }
  while (root.childNodes.length > same) root.lastChild.remove();
  for (const block of blocks.slice(same)) root.append(render(block, 0));
  root.blocks = blocks;
}
