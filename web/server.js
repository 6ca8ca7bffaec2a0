// What the server does now: numbers and a rate over time, from GET /metrics while the pane is open.

import {getText} from './api.js';
import {$, h, svg} from './dom.js';
import {count, duration, t} from './i18n.js';

const PERIOD_MS = 1000, SAMPLES = 60;

// Prometheus text to a map: name -> sum over its labels.
export function readMetrics(text) {
  const out = new Map();
  for (const line of text.split('\n')) {
    const match = /^([a-zA-Z_:][\w:]*)(?:\{.*\})?\s+(\S+)/.exec(line);
    const value = match ? Number(match[2]) : NaN;
    if (Number.isFinite(value)) out.set(match[1], (out.get(match[1]) || 0) + value);
  }
  return out;
}

export class ServerPane {
  constructor() {
    this.open = false;
    this.rates = [];
    this.about = '';  // the engine in words
    this.root = $('pane-server');
  }

  setOpen(open) {
    if (open === this.open) return;
    this.open = open;
    clearTimeout(this.timer);
    if (!open) return;
    this.rates = [];
    this.before = null;
    this.build();
    this.poll();
  }

  repaint() {
    if (this.open) { this.build(); this.draw(); }
  }

  build() {
    const tile = (key) => {
      const value = h('dd', null, '–');
      this[key] = value;
      return h('div', {class: 'tile'}, h('dt', null, t(key)), value);
    };
    this.problem = h('p', {class: 'muted', role: 'status'});
    this.now = h('b', {class: 'big'}, '–');
    this.peak = h('span', {class: 'muted'});
    this.line = svg('polyline', {class: 'line'});
    this.area = svg('polygon', {class: 'area'});
    this.chart = svg('svg', {class: 'chart', viewBox: '0 0 300 80', preserveAspectRatio: 'none', role: 'img'}, this.area, this.line);
    this.root.replaceChildren(this.problem,
      h('div', {class: 'row'}, h('span', {class: 'muted grow'}, t('srvThroughput')), this.peak), this.now, this.chart,
      h('dl', {class: 'tiles'}, ['srvRunning', 'srvQueue', 'srvKv', 'srvHits', 'srvTtft', 'srvFinished'].map(tile)),
      h('p', {class: 'muted'}, this.about));
  }

  async poll() {
    if (!document.hidden) {
      try {
        this.take(readMetrics(await getText('/metrics')), performance.now());
        this.problem.textContent = '';
      } catch (error) {
        this.problem.textContent = error.kind === 'server' ? t('srvUnavailable') : error.message;
      }
    }
    if (!this.open) return;
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.poll(), PERIOD_MS);
  }

  take(metrics, at) {
    const before = this.before;
    this.before = {metrics, at};
    this.metrics = metrics;
    if (before) {
      const name = 'minimind_generated_tokens_total';
      const tokens = (metrics.get(name) || 0) - (before.metrics.get(name) || 0);
      this.rates.push(Math.max(0, tokens) / ((at - before.at) / 1000));  // a restarted server counts from zero
      if (this.rates.length > SAMPLES) this.rates.shift();
    }
    if (this.open) this.draw();
  }

  draw() {
    const m = this.metrics;
    if (!m) return;
    const get = (name) => m.get('minimind_' + name);
    const set = (key, value, text) => { this[key].textContent = value === undefined || Number.isNaN(value) ? '–' : text(value); };
    const percent = (x) => (x * 100).toFixed(x < 0.0995 && x > 0 ? 1 : 0) + ' %';
    set('srvRunning', get('requests_running'), count);
    set('srvQueue', get('requests_waiting'), count);
    set('srvKv', get('kv_blocks_used') / get('kv_blocks'), percent);
    set('srvHits', get('answered_cached_tokens_total') / get('answered_prompt_tokens_total'), percent);
    set('srvTtft', get('time_to_first_token_seconds_sum') / get('time_to_first_token_seconds_count'), (s) => duration(s * 1000));
    set('srvFinished', get('requests_finished_total'), count);
    const {rates} = this, peak = Math.max(1, ...rates), now = rates.length ? rates[rates.length - 1] : 0;
    this.now.textContent = t('rate', {n: count(now)});
    this.peak.textContent = rates.length ? t('srvPeak', {n: count(peak)}) : '';
    const points = rates.map((r, i) => `${(300 - (rates.length - 1 - i) * 300 / (SAMPLES - 1)).toFixed(1)},${(77 - 72 * r / peak).toFixed(1)}`);
    const left = 300 - (rates.length - 1) * 300 / (SAMPLES - 1);
    this.line.setAttribute('points', points.join(' '));
    this.area.setAttribute('points', rates.length ? `${left},80 ${points.join(' ')} 300,80` : '');
    this.chart.setAttribute('aria-label', t('srvChart', {s: SAMPLES, n: count(now)}));
  }
}
