// One answer: the request made of a conversation, the stream read into a message, and its times.

import {ApiError, streamChat} from './api.js';
import {t} from './i18n.js';
import {settings} from './store.js';

// What the server is to see of a conversation. Thinking is not sent back; a call without result is left out.
export function apiMessages(messages) {
  const out = [];
  if (settings.system.trim()) out.push({role: 'system', content: settings.system});
  const answered = new Set(messages.filter((m) => m.role === 'tool').map((m) => m.tool_call_id));
  for (const message of messages) {
    if (message.role === 'assistant') {
      const calls = message.tool_calls.filter((call) => answered.has(call.id));
      if (!message.content && !calls.length) continue;
      const item = {role: 'assistant', content: message.content};
      if (calls.length) {
        item.tool_calls = calls.map((call) => ({id: call.id, type: 'function',
                                                function: {name: call.name, arguments: call.arguments}}));
      }
      out.push(item);
    } else if (message.role === 'tool') {
      out.push({role: 'tool', tool_call_id: message.tool_call_id, content: message.content});
    } else {
      out.push({role: 'user', content: message.content});
    }
  }
  return out;
}

const LIVE_MS = 200;  // how often the live rate moves

export class Answer {
  // onchange(answer) after every change of the message. The message is filled in place.
  constructor(message, onchange) {
    this.message = message;
    this.onchange = onchange;
    this.control = new AbortController();
    this.chunks = 0;
    this.liveRate = 0;
    this.first = this.last = this.thinkingSince = 0;
    this.now = '';  // what is being written: '', thinking, text, call
  }

  stop() { this.control.abort(); }

  // Resolves when the answer is over, whatever happened; message.error and message.finish say what did.
  async run(body) {
    const message = this.message;
    this.sent = performance.now();
    const clock = setInterval(() => this.onchange(this), LIVE_MS);
    try {
      await streamChat(body, this.control.signal, (chunk) => this.take(chunk));
      if (!message.finish && !message.content && !message.reasoning && !message.tool_calls.length) {
        throw new ApiError('format', t('errFormat'));
      }
    } catch (error) {
      if (error.name === 'AbortError') {
        message.finish = 'cancelled';
      } else {
        message.error = error instanceof ApiError ? error.message : String(error.message || error);
        this.kind = error.kind || 'page';
        this.retryAfter = error.retryAfter || 0;
      }
    } finally {
      clearInterval(clock);
    }
    this.endThinking();
    this.finishStats();
    this.done = true;
    this.onchange(this);
  }

  thinkingMs() {
    return this.thinkingSince ? performance.now() - this.thinkingSince : this.message.reasoning_ms;
  }

  endThinking() {
    if (!this.thinkingSince) return;
    this.message.reasoning_ms = this.thinkingMs();
    this.thinkingSince = 0;
  }

  take(chunk) {
    const message = this.message, choice = (chunk.choices || [])[0];
    if (chunk.usage) this.usage = chunk.usage;
    const delta = (choice && choice.delta) || {};
    const calls = Array.isArray(delta.tool_calls) ? delta.tool_calls : [];
    const reasoning = typeof delta.reasoning_content === 'string' ? delta.reasoning_content : '';
    const content = typeof delta.content === 'string' ? delta.content : '';
    if (reasoning || content || calls.length) {
      this.last = performance.now();
      if (!this.first) this.first = this.last;
      this.chunks++;
    }
    if (reasoning) {
      if (!this.thinkingSince) this.thinkingSince = performance.now() - message.reasoning_ms;
      message.reasoning += reasoning;
      this.now = 'thinking';
    }
    if (content) {
      this.endThinking();
      message.content += content;
      this.now = 'text';
    }
    for (const part of calls) {
      this.endThinking();
      this.now = 'call';
      const index = Number.isInteger(part.index) && part.index >= 0 && part.index < 100 ? part.index : 0;
      while (message.tool_calls.length <= index) message.tool_calls.push({id: '', name: '', arguments: ''});
      const call = message.tool_calls[index], fn = part.function || {};
      if (typeof part.id === 'string' && part.id) call.id = part.id;
      if (typeof fn.name === 'string') call.name += fn.name;
      if (typeof fn.arguments === 'string') call.arguments += fn.arguments;
    }
    if (choice && choice.finish_reason) message.finish = String(choice.finish_reason);
    this.onchange(this);
  }

  // While it runs a chunk counts as a token; the usage at the end says the truth.
  rate(tokens) {
    const span = this.last - this.first;
    if (tokens > 1 && span >= 5) return (tokens - 1) / span * 1000;
    return tokens ? tokens / Math.max(this.last - this.sent, 0.1) * 1000 : 0;
  }

  live() {
    if (!this.first || this.done) return null;
    const now = performance.now();
    if (!this.liveAt || now - this.liveAt >= LIVE_MS) {
      this.liveAt = now;
      this.liveRate = this.rate(this.chunks);
    }
    return {ttft: this.first - this.sent, rate: this.liveRate};
  }

  finishStats() {
    const message = this.message;
    message.tool_calls.forEach((call, i) => { call.id = call.id || 'call_' + i + '_' + Date.now().toString(36); });
    if (!this.first) return;
    const usage = this.usage || {}, details = usage.prompt_tokens_details || {};
    const tokens = usage.completion_tokens || this.chunks;
    message.stats = {ttft: this.first - this.sent, rate: this.rate(tokens), completion: tokens};
    if (usage.prompt_tokens) message.stats.prompt = usage.prompt_tokens;
    if (details.cached_tokens) message.stats.cached = details.cached_tokens;
  }
}
