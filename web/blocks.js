// The physical blocks of the KV cache by sequence, live from GET /debug/blocks while the pane is open.

import {getJson} from './api.js';
import {$, h} from './dom.js';
import {count, t} from './i18n.js';

const COLOURS = 10;         // --b0 ... --b9 in the style sheet
const PERIOD_MS = 300;
const MAX_HEIGHT = 520;     // px the map wants to stay within while cells are not too small
const MAX_ROWS = 400;       // of the block table

const isIndex = (x, n) => Number.isInteger(x) && x >= 0 && x < n;

// Checked and indexed: owners of each block, in order of the list.
export function readMap(data) {
  const n = Math.min(Math.max(0, Math.floor(Number(data && data.n_block) || 0)), 4e6);
  const size = Math.max(1, Math.floor(Number(data && data.block_size) || 1));
  const owners = [], first = new Int32Array(n).fill(-1), shared = new Map(), cached = new Uint8Array(n);
  for (const raw of Array.isArray(data && data.owners) ? data.owners : []) {
    const blocks = (Array.isArray(raw.blocks) ? raw.blocks : []).filter((b) => isIndex(b, n));
    const index = owners.length;
    owners.push({request: Number(raw.request) || 0, choice: Number(raw.choice) || 0, tokens: Number(raw.n_tok) || 0,
                 running: raw.running === true, blocks, key: `${Number(raw.request) || 0}.${Number(raw.choice) || 0}`});
    for (const b of blocks) {
      if (first[b] < 0) first[b] = index;
      else shared.set(b, [...(shared.get(b) || [first[b]]), index]);
    }
  }
  let used = 0, kept = 0;
  for (const b of Array.isArray(data && data.cached) ? data.cached : []) {
    if (isIndex(b, n) && first[b] < 0 && !cached[b]) { cached[b] = 1; kept++; }
  }
  let top = -1;  // the last block that is not free
  for (let b = 0; b < n; b++) {
    used += first[b] >= 0;
    if (first[b] >= 0 || cached[b]) top = b;
  }
  return {n, size, owners, first, shared, cached, used, kept, free: n - used - kept, top};
}

export class BlocksPane {
  constructor() {
    this.open = false;
    this.selected = '';
    this.shown = 0;            // blocks drawn: of a large pool those that were ever in use while the pane was open
    this.colours = new Map();  // key of an owner -> colour index, kept while it lives
    this.root = $('pane-blocks');
    new ResizeObserver(() => { if (this.open && this.map) this.draw(); }).observe(this.root);
  }

  build() {
    this.summary = h('p', {class: 'muted'});
    this.share = h('div', {class: 'share', 'aria-hidden': 'true'}, ['used', 'shared', 'cached', 'free'].map((k) => h('i', {class: k})));
    this.legend = h('ul', {class: 'legend'});
    this.canvas = h('canvas', {role: 'img'});
    this.tip = h('div', {class: 'tip', hidden: true, 'aria-hidden': 'true'});
    this.frame = h('div', {class: 'map', tabindex: '0', role: 'group', 'aria-label': t('blocks')}, this.canvas);
    this.list = h('ul', {class: 'sequences'});
    this.table = h('div');
    this.problem = h('p', {class: 'muted', role: 'status'});
    this.canvas.addEventListener('pointermove', (event) => this.hover(event));
    this.canvas.addEventListener('pointerleave', () => { this.tip.hidden = true; });
    this.canvas.addEventListener('click', (event) => {
      const owner = this.map.owners[this.map.first[this.blockAt(event)]];
      this.select(owner && owner.key !== this.selected ? owner.key : '');
    });
    this.listKey = this.tableKey = '';
    this.root.replaceChildren(h('p', {class: 'muted'}, t('kvIntro')), this.problem, this.share, this.legend, this.summary,
                              h('div', {class: 'map-box'}, this.frame, this.tip), h('h3', null, t('kvSequences')), this.list, this.table);
  }

  setOpen(open) {
    if (open === this.open) return;
    this.open = open;
    clearTimeout(this.timer);
    if (open) {
      this.build();
      this.poll();
    }
  }

  repaint() {
    this.patterns = null;
    if (!this.open) return;
    this.build();
    if (this.map) this.draw();
  }

  async poll() {
    const begun = performance.now();
    if (!document.hidden) {
      try {
        this.map = readMap(await getJson('/debug/blocks'));
        this.problem.textContent = '';
      } catch (error) {
        this.problem.textContent = error.kind === 'server' ? t('kvUnavailable') : error.message;
      }
      if (this.open && this.map) this.draw();
    }
    if (!this.open) return;
    clearTimeout(this.timer);
    // A large map is asked for less often.
    this.timer = setTimeout(() => this.poll(), Math.max(PERIOD_MS, 4 * (performance.now() - begun)));
  }

  colourOf(owner) {
    return this.colours.get(owner.key);
  }

  assignColours() {
    const alive = new Set(this.map.owners.map((o) => o.key));
    for (const key of this.colours.keys()) if (!alive.has(key)) this.colours.delete(key);
    const taken = new Array(COLOURS).fill(0);
    for (const c of this.colours.values()) taken[c]++;
    for (const owner of this.map.owners) {
      if (this.colours.has(owner.key)) continue;
      const c = taken.indexOf(Math.min(...taken));
      taken[c]++;
      this.colours.set(owner.key, c);
    }
    if (!alive.has(this.selected)) this.selected = '';
  }

  select(key) {
    this.selected = key;
    this.draw();
  }

  draw() {
    const {n, top} = this.map, wanted = Math.max(256, Math.ceil((top + 1) / 64) * 64, this.shown);
    this.shown = wanted > n / 2 ? n : wanted;
    this.assignColours();
    this.drawMap();
    this.drawTexts();
  }

  // A fill style: one colour, or diagonal bands of the owners' colours; thin lines for what is cached.
  paint(ctx, key, cell) {
    this.patterns = this.patterns || new Map();
    const name = key + '|' + cell, known = this.patterns.get(name);
    if (known) return known;
    const css = getComputedStyle(document.documentElement), value = (v) => css.getPropertyValue(v).trim();
    const bands = key === 'cached' ? [value('--cell-free'), value('--cell-hatch')] :
      key.split(',').slice(0, 6).map((c) => value(c === 'free' ? '--cell-free' : '--b' + c));
    let fill = bands[0];
    if (bands.length > 1) {
      const width = key === 'cached' ? 3 : Math.max(3, Math.round(cell / 3.5)), side = width * bands.length;
      const tile = h('canvas', {width: side, height: side}), pen = tile.getContext('2d');
      for (let y = 0; y < side; y++) {
        for (let x = 0; x < side; x++) {
          pen.fillStyle = bands[Math.floor(((x + y) % side) / width)];
          pen.fillRect(x, y, 1, 1);
        }
      }
      fill = ctx.createPattern(tile, 'repeat');
    }
    this.patterns.set(name, fill);
    return fill;
  }

  layout() {
    const n = this.shown, width = Math.max(120, this.frame.clientWidth);
    for (let columns = 8; ; columns += 8) {  // numbers one can count with
      const cell = Math.floor(width / columns), rows = Math.max(1, Math.ceil(n / columns));
      if (cell <= (n > 60000 ? 3 : 26) && (rows * cell <= MAX_HEIGHT || cell <= 6)) return {cell: Math.max(1, cell), columns, rows};
    }
  }

  drawMap() {
    const {map, canvas} = this, {cell, columns, rows} = (this.grid = this.layout());
    const ratio = columns * cell * rows * cell > 4e6 ? 1 : Math.min(devicePixelRatio || 1, 2);
    const width = columns * cell, height = rows * cell;
    if (canvas.width !== width * ratio || canvas.height !== height * ratio) {
      canvas.width = width * ratio;
      canvas.height = height * ratio;
      canvas.style.width = width + 'px';
      canvas.style.height = height + 'px';
    }
    canvas.dataset.columns = columns;
    const ctx = canvas.getContext('2d');
    ctx.setTransform(ratio, 0, 0, ratio, 0, 0);
    ctx.clearRect(0, 0, width, height);
    const gap = cell > 12 ? 2 : cell > 4 ? 1 : 0, side = cell - gap, radius = cell > 12 ? 4 : cell > 7 ? 2 : 0;
    const chosen = map.owners.find((o) => o.key === this.selected);
    const order = new Map(chosen ? chosen.blocks.map((b, i) => [b, i]) : []);
    const last = new Map();  // block -> part of it that holds tokens, of sequences' last blocks
    for (const o of map.owners) {
      const used = o.tokens - (o.blocks.length - 1) * map.size;
      if (o.blocks.length && used > 0 && used < map.size) last.set(o.blocks[o.blocks.length - 1], used / map.size);
    }
    const box = (x, y, w, height_) => {
      ctx.beginPath();
      if (radius) ctx.roundRect(x, y, w, height_, Math.min(radius, height_ / 2));
      else ctx.rect(x, y, w, height_);
      ctx.fill();
    };
    ctx.textAlign = 'center';
    ctx.textBaseline = 'middle';
    ctx.font = `600 ${Math.max(9, Math.round(cell * 0.42))}px system-ui, sans-serif`;
    const css = getComputedStyle(document.documentElement);
    const ink = css.getPropertyValue('--text').trim(), page = css.getPropertyValue('--page').trim();
    for (let b = 0; b < this.shown; b++) {
      const x = (b % columns) * cell, y = Math.floor(b / columns) * cell, owner = map.first[b];
      if (owner < 0) {
        ctx.globalAlpha = chosen ? 0.5 : 1;
        ctx.fillStyle = this.paint(ctx, map.cached[b] ? 'cached' : 'free', cell);
        box(x, y, side, side);
        continue;
      }
      const owners = map.shared.get(b) || [owner];
      ctx.globalAlpha = chosen && !order.has(b) ? 0.22 : 1;
      const part = last.get(b);
      if (part && side > 6 && owners.length === 1) {  // partly filled: a pale cell with its level
        const full = ctx.globalAlpha;
        ctx.fillStyle = this.paint(ctx, String(this.colourOf(map.owners[owner])), cell);
        ctx.globalAlpha = full * 0.35;
        box(x, y, side, side);
        ctx.globalAlpha = full;
        const filled = Math.max(2, Math.round(side * part));
        box(x, y + side - filled, side, filled);
      } else {
        ctx.fillStyle = this.paint(ctx, [...new Set(owners.map((i) => this.colourOf(map.owners[i])))].join(), cell);
        box(x, y, side, side);
      }
      if (chosen && order.has(b) && cell >= 16) {
        const label = String(order.get(b)), w = ctx.measureText(label).width + 4;
        ctx.fillStyle = page;
        ctx.globalAlpha = 0.85;
        const tall = Math.round(side * 0.62);
        ctx.fillRect(x + (side - w) / 2, y + (side - tall) / 2, w, tall);
        ctx.globalAlpha = 1;
        ctx.fillStyle = ink;
        ctx.fillText(label, x + side / 2, y + side / 2 + 0.5);
      }
    }
    ctx.globalAlpha = 1;
  }

  blockAt(event) {
    const {cell, columns} = this.grid, box = this.canvas.getBoundingClientRect();
    const column = Math.floor((event.clientX - box.left) / cell), row = Math.floor((event.clientY - box.top) / cell);
    const b = row * columns + column;
    return column >= 0 && column < columns && row >= 0 && b < this.shown ? b : -1;
  }

  nameOf(owner) {
    const choices = this.map.owners.filter((o) => o.request === owner.request).length;
    return t('kvSequence', {r: owner.request}) + (choices > 1 || owner.choice ? ', ' + t('kvChoice', {c: owner.choice}) : '');
  }

  hover(event) {
    const {map} = this, b = this.blockAt(event);
    this.tip.hidden = b < 0;
    if (b < 0) return;
    if (map.first[b] < 0) {
      this.tip.textContent = t(map.cached[b] ? 'kvTipCached' : 'kvTipFree', {b});
    } else {
      const owners = (map.shared.get(b) || [map.first[b]]).map((i) => map.owners[i]);
      const at = owners[0].blocks.indexOf(b) * map.size;
      this.tip.textContent = t('kvTipUsed', {b, who: owners.slice(0, 4).map((o) => this.nameOf(o)).join(' + ') + (owners.length > 4 ? ' …' : ''),
                                             from: at, to: Math.min(at + map.size, Math.max(owners[0].tokens, at + 1)) - 1});
    }
    const box = this.frame.parentElement.getBoundingClientRect();
    const x = Math.min(event.clientX - box.left, box.width - this.tip.offsetWidth - 4);
    this.tip.style.left = Math.max(0, x) + 'px';
    this.tip.style.top = event.clientY - box.top + 18 + 'px';
  }

  drawTexts() {
    const {map} = this, nShared = map.shared.size;
    const numbers = {n: count(map.n), size: map.size, used: count(map.used), shared: count(nShared), cached: count(map.kept), free: count(map.free)};
    const summary = t('kvSummary', numbers) + (this.shown < map.n ? ' · ' + t('kvBeyond', {n: count(map.n - this.shown)}) : '');
    if (this.summary.textContent !== summary) this.summary.textContent = summary;
    this.canvas.setAttribute('aria-label', t('kvImage', numbers));
    const parts = [map.used - nShared, nShared, map.kept, map.free];
    [...this.share.children].forEach((node, i) => { node.style.flexGrow = parts[i]; node.hidden = !parts[i]; });
    const legend = [['used', parts[0]], ['shared', nShared], ['cached', map.kept], ['free', map.free]];
    this.legend.replaceChildren(...legend.map(([kind, n]) => h('li', null, h('i', {class: 'swatch ' + kind}),
      t({used: 'kvUsed', shared: 'kvShared', cached: 'kvCached', free: 'kvFree'}[kind]), h('b', null, count(n)))));
    const key = JSON.stringify([map.owners.map((o) => [o.key, o.tokens, o.blocks.length, o.running]), this.selected]);
    if (key !== this.listKey) {
      this.listKey = key;
      const focus = document.activeElement && document.activeElement.dataset.key;
      const shown = map.owners.slice(0, 200);
      this.list.replaceChildren(...shown.map((owner) => h('li', null, h('button', {
        'aria-pressed': owner.key === this.selected ? 'true' : 'false', 'data-key': owner.key,
        onclick: () => this.select(owner.key === this.selected ? '' : owner.key),
      }, h('i', {class: 'swatch b' + this.colourOf(owner)}), h('span', {class: 'grow'}, this.nameOf(owner)),
      h('span', {class: 'muted'}, t('kvSize', {t: count(owner.tokens), b: count(owner.blocks.length)})),
      h('span', {class: 'state' + (owner.running ? ' on' : '')}, t(owner.running ? 'kvRunning' : 'kvWaiting'))))));
      if (!map.owners.length) this.list.append(h('li', {class: 'muted'}, t('kvNone')));
      if (focus) {
        const button = this.list.querySelector(`[data-key="${CSS.escape(focus)}"]`);
        if (button) button.focus();
      }
    }
    this.drawTable();
  }

  // The block table of the selected sequence: logical block -> physical block.
  drawTable() {
    const {map} = this, owner = map.owners.find((o) => o.key === this.selected);
    const key = owner ? JSON.stringify([owner.key, owner.tokens, owner.blocks, owner.blocks.map((b) => (map.shared.get(b) || []).length)]) : '';
    if (key === this.tableKey) return;
    this.tableKey = key;
    if (!owner) { this.table.replaceChildren(); return; }
    const rows = owner.blocks.slice(0, MAX_ROWS).map((b, i) => {
      const used = Math.max(0, Math.min(map.size, owner.tokens - i * map.size));
      const others = (map.shared.get(b) || []).map((k) => map.owners[k]).filter((o) => o !== owner);
      return h('tr', null, h('td', null, String(i)), h('td', null, String(b)), h('td', null, `${used} / ${map.size}`),
               h('td', null, others.slice(0, 6).map((o) => h('i', {class: 'swatch b' + this.colourOf(o), title: this.nameOf(o)})),
                 others.length ? ' ' + others.slice(0, 3).map((o) => this.nameOf(o)).join(', ') + (others.length > 3 ? ' …' : '') : '–'));
    });
    const head = ['kvColLogical', 'kvColPhysical', 'kvColTokens', 'kvColShared'].map((k) => h('th', {scope: 'col'}, t(k)));
    const more = owner.blocks.length - rows.length;
    this.table.replaceChildren(h('h3', null, t('kvTable', {r: owner.request})),
      h('div', {class: 'table', tabindex: '0', role: 'group', 'aria-label': t('kvTable', {r: owner.request})},
        h('table', null, h('thead', null, h('tr', null, head)), h('tbody', null, rows))),
      more > 0 ? h('p', {class: 'muted'}, t('kvMore', {n: count(more)})) : '');
  }
}
