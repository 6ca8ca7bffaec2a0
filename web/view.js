// How messages look. A view is made once a message and updated in place while the answer is being written.

import {copyButton, h, icon, iconButton, isSend} from './dom.js';
import {highlight} from './highlight.js';
import {count, duration, t} from './i18n.js';
import {showMarkdown} from './markdown.js';

export function userView(message, act) {
  const body = h('div', {class: 'bubble', dir: 'auto'}, message.content);
  const actions = h('div', {class: 'actions'},
    copyButton(t('copy'), t('copied'), () => message.content),
    iconButton('pen', t('edit'), () => edit()),
    iconButton('trash', t('remove'), () => act.remove(message)));
  const root = h('article', {class: 'msg user', 'aria-label': t('you')}, body, actions);

  function edit() {
    const area = h('textarea', {value: message.content, 'aria-label': t('editMessage')});
    const close = () => { box.replaceWith(body); actions.hidden = false; };
    const send = () => { if (area.value.trim()) act.resend(message, area.value.trim()); };
    const box = h('div', {class: 'editor'}, area, h('div', {class: 'row end'},
      h('button', {class: 'plain', onclick: () => { close(); act.focus(); }}, t('cancel')),
      h('button', {class: 'strong', onclick: send}, t('send'))));
    area.addEventListener('keydown', (event) => {
      if (event.key === 'Escape' && !event.isComposing) { event.stopPropagation(); close(); act.focus(); }
      if (isSend(event)) { event.preventDefault(); send(); }
    });
    body.replaceWith(box);
    actions.hidden = true;
    area.style.height = Math.min(area.scrollHeight + 2, 400) + 'px';
    area.focus();
    area.setSelectionRange(area.value.length, area.value.length);
  }
  return {root, edit, update() {}};
}

function prettyJson(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text;
  }
}

function toolCard(call, result, ask, onresult) {
  const state = result !== undefined ? t('toolAnswered') : ask ? t('toolWaiting') : '';
  const card = h('section', {class: 'tool', 'aria-label': t('toolCall') + ' ' + call.name},
    h('header', null, icon('tool'), h('strong', null, call.name || '…'), h('span', {class: 'muted'}, state)),
    h('div', {class: 'label'}, t('toolArgs')),
    h('pre', {tabindex: '0', 'aria-label': t('toolArgs')}, h('code', null, ...highlight(prettyJson(call.arguments), 'json'))));
  if (result !== undefined) {
    card.append(h('div', {class: 'label'}, t('toolResult')), h('pre', {tabindex: '0', 'aria-label': t('toolResult')}, result));
  } else if (ask) {
    const area = h('textarea', {rows: '2', placeholder: t('toolHint'), 'aria-label': t('toolResultOf', {name: call.name})});
    area.addEventListener('keydown', (event) => {
      if (isSend(event)) { event.preventDefault(); onresult(); }
    });
    card.append(h('div', {class: 'label'}, t('toolResult')), area);
    card.result = area;
  }
  return card;
}

// `context(message)` says what is around it: {answer (while it is written), results (Map of call id to text), last}.
export function assistantView(message, context, act) {
  const thinkText = h('div', {class: 'md', dir: 'auto'}), thinkLabel = h('span');
  const think = h('details', {class: 'think', hidden: true},
                  h('summary', null, icon('think'), thinkLabel, icon('next')), thinkText);
  const body = h('div', {class: 'md', dir: 'auto'});
  const calls = h('div', {class: 'calls'});
  const wait = h('div', {class: 'wait', 'aria-hidden': 'true'}, h('i'), h('i'), h('i'));
  const problem = h('p', {class: 'problem', role: 'alert', hidden: true});
  const stats = h('span', {class: 'stats'});
  const actions = h('div', {class: 'actions'},
    copyButton(t('copy'), t('copied'), () => message.content || message.reasoning),
    iconButton('redo', t('regenerate'), () => act.regenerate(message)),
    iconButton('trash', t('remove'), () => act.remove(message)));
  const foot = h('footer', null, stats, actions);
  const root = h('article', {class: 'msg assistant', 'aria-label': t('assistant')}, think, body, calls, wait, problem, foot);
  let callsShown = '', shown = null, shownThinking = null, live = false;

  const showThinking = () => {
    if (!think.open || shownThinking === message.reasoning) return;
    shownThinking = message.reasoning;
    showMarkdown(thinkText, message.reasoning);
  };
  think.addEventListener('toggle', showThinking);

  function showStats(answer) {
    const live = answer && answer.live();
    const parts = [];
    if (live) {
      parts.push(t('liveRate', {n: count(live.rate)}), t('ttft', {n: duration(live.ttft)}));
    } else if (message.stats && !answer) {
      const s = message.stats;
      if (s.completion) parts.push(t(s.completion === 1 ? 'token' : 'tokens', {n: count(s.completion)}));
      if (s.rate) parts.push(t('rate', {n: count(s.rate)}));
      if (s.ttft) parts.push(t('ttft', {n: duration(s.ttft)}));
      if (s.prompt) parts.push(t(s.cached ? 'promptCached' : 'prompt', {n: count(s.prompt), c: count(s.cached || 0)}));
    }
    if (!answer && message.finish === 'length') parts.push(t('cutLength'));
    if (!answer && message.finish === 'cancelled') parts.push(t('stopped'));
    const text = parts.join(' · ');
    if (stats.textContent !== text) stats.replaceChildren(...parts.map((part) => h('span', null, part)));
  }

  function showCalls(answer, results, last) {
    const ask = !answer && last && message.tool_calls.some((call) => !results.has(call.id));
    const key = JSON.stringify([message.tool_calls, [...results], ask]);
    if (key === callsShown) return;
    callsShown = key;
    let cards = [];
    const send = () => act.toolResults(message, cards.filter((card) => card.result)
      .map((card) => ({id: card.call.id, text: card.result.value})));
    cards = message.tool_calls.map((call) => Object.assign(toolCard(call, results.get(call.id), ask, send), {call}));
    calls.replaceChildren(...cards);
    if (ask) {
      calls.append(h('div', {class: 'row end'}, h('button', {class: 'strong', onclick: send},
                                                  t(cards.filter((c) => c.result).length > 1 ? 'toolSendAll' : 'toolSend'))));
    }
  }

  function showProblem() {
    problem.hidden = !message.error;
    if (problem.hidden || problem.textContent) return;
    problem.append(icon('alert'), h('span', null, message.error),
                   h('button', {class: 'plain', onclick: () => act.regenerate(message)}, t('retry')));
  }

  function update() {
    const {answer, results, last} = context(message);
    root.classList.toggle('live', Boolean(answer));
    think.hidden = !message.reasoning;
    if (message.reasoning) {
      const open = answer && answer.now === 'thinking';
      think.classList.toggle('live', Boolean(open));
      const s = duration(answer ? answer.thinkingMs() : message.reasoning_ms);
      const label = open ? `${t('thinking')} ${s}` :
        t(message.content || message.tool_calls.length ? 'thought' : 'thoughtOpen', {s});
      if (thinkLabel.textContent !== label) thinkLabel.textContent = label;
      if (live && !answer && !message.content && !message.tool_calls.length) think.open = true;  // there is nothing else
      showThinking();
    }
    if (shown !== message.content) {
      shown = message.content;
      showMarkdown(body, message.content);
    }
    wait.hidden = !answer || Boolean(answer.now);
    foot.classList.toggle('live', Boolean(answer));
    showCalls(answer, results, last);
    showProblem();
    showStats(answer);
    live = Boolean(answer);
  }
  update();
  return {root, update, text: () => body.textContent};
}
