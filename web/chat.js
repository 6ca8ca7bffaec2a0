// The conversation on show: its messages, and what can be done with them.

import {Answer, apiMessages} from './answer.js';
import {$, announce, h, toast} from './dom.js';
import {t} from './i18n.js';
import {newChat, saveChat} from './store.js';
import {assistantView, userView} from './view.js';

const FOLLOW = 80;     // px from the end within which the view follows the text
const SAVE_MS = 3000;  // how often a running answer is saved

export class Chat {
  // host: {fields() -> object or null, changed(), needKey(then), model()}
  constructor(host) {
    this.host = host;
    this.chat = newChat();
    this.answers = new Map();  // chat -> Answer; an answer goes on while another conversation is on show
    this.views = new Map();    // message -> view, of the conversation on show
    this.follow = true;
    this.log = $('log');
    this.log.addEventListener('scroll', () => {
      this.follow = this.log.scrollHeight - this.log.scrollTop - this.log.clientHeight < FOLLOW;
      $('jump').hidden = this.follow;
    }, {passive: true});
    $('jump').addEventListener('click', () => { this.toEnd(); });
    new ResizeObserver(() => { if (this.follow) this.toEnd(); }).observe($('messages'));
  }

  busy(chat = this.chat) { return this.answers.has(chat); }

  toEnd() {
    this.follow = true;
    this.log.scrollTop = this.log.scrollHeight;
  }

  show(chat) {
    this.chat = chat;
    this.render();
    this.toEnd();
  }

  render() {
    const box = $('messages');
    this.views.clear();
    box.replaceChildren();
    if (!this.chat.messages.length) {
      box.append(this.welcome());
    } else {
      for (const message of this.chat.messages) this.append(message);
    }
    this.host.changed();
  }

  welcome() {
    const tries = ['try1', 'try2', 'try3'].map((key) =>
      h('button', {class: 'try', onclick: () => this.send(t(key))}, t(key)));
    return h('div', {class: 'welcome'}, h('h2', null, t('hello')), h('p', null, t('helloText')),
             h('div', {class: 'tries'}, tries));
  }

  append(message) {
    if (message.role === 'tool') return;
    const view = message.role === 'user' ? userView(message, this) : assistantView(message, (m) => this.context(m), this);
    this.views.set(message, view);
    $('messages').append(view.root);
  }

  context(message) {
    const {messages} = this.chat, answer = this.answers.get(this.chat), results = new Map();
    let i = messages.indexOf(message) + 1;
    for (; i < messages.length && messages[i].role === 'tool'; i++) results.set(messages[i].tool_call_id, messages[i].content);
    return {answer: answer && answer.message === message ? answer : null, results, last: i === messages.length};
  }

  focus() {
    if (matchMedia('(pointer: fine)').matches) $('input').focus();
  }

  // True when the text was taken.
  send(text) {
    if (this.busy() || !text.trim()) return false;
    const fields = this.host.fields();
    if (!fields) return false;
    this.chat.messages.push({role: 'user', content: text.trim()});
    this.start(fields);
    return true;
  }

  start(fields) {
    const chat = this.chat;
    const body = {model: this.host.model(), messages: apiMessages(chat.messages), stream: true,
                  stream_options: {include_usage: true}, ...fields};
    const message = {role: 'assistant', content: '', reasoning: '', reasoning_ms: 0, tool_calls: [], finish: ''};
    chat.messages.push(message);
    chat.updated = Date.now();
    saveChat(chat);
    let planned = false, saved = Date.now();
    const answer = new Answer(message, () => {
      if (planned) return;
      planned = true;
      const draw = () => {
        planned = false;
        if (answer.done) return;
        const view = this.views.get(message);
        if (view) view.update();
        if (view && this.follow) this.toEnd();
        if (Date.now() - saved > SAVE_MS) { saved = Date.now(); saveChat(chat); }
      };
      // A hidden page draws no frames; long texts are drawn less often.
      if (document.hidden || message.content.length > 20000) setTimeout(draw, 100);
      else requestAnimationFrame(draw);
    });
    this.answers.set(chat, answer);
    this.render();
    this.toEnd();
    this.focus();
    announce(t('working'));
    answer.over = answer.run(body).then(() => this.finish(chat, answer));
  }

  finish(chat, answer) {
    const {message} = answer;
    this.answers.delete(chat);
    chat.updated = Date.now();
    if (chat.messages.includes(message)) saveChat(chat);
    const view = this.views.get(message);
    if (view) {
      view.update();
      if (this.follow) this.toEnd();
      if (!message.error) announce(`${t('answered')}: ${view.text().slice(0, 500)}`);
      const field = view.root.querySelector('.tool textarea');
      if (field && matchMedia('(pointer: fine)').matches) field.focus();
    }
    this.host.changed();
    if (answer.kind === 'key') this.host.needKey(() => { if (this.chat === chat) this.regenerate(message); });
  }

  stop(chat = this.chat) {
    const answer = this.answers.get(chat);
    if (answer) answer.stop();
  }

  // Throws away `from` and what follows, and answers again.
  async again(from, edited) {
    const {chat} = this, running = this.answers.get(chat);
    if (running) {
      running.stop();
      await running.over;
    }
    const fields = this.host.fields(), at = chat.messages.indexOf(from);
    if (!fields || at < 0 || this.chat !== chat) return;
    const before = [...chat.messages];
    chat.messages.splice(at);
    if (edited !== undefined) chat.messages.push({role: 'user', content: edited});
    this.start(fields);
    if (before.length - at > 2) {
      this.offerUndo(chat, () => {
        this.stop(chat);
        chat.messages.splice(0, Infinity, ...before);
      });
    }
  }

  regenerate(message) { this.again(message); }

  resend(message, text) { this.again(message, text); }

  regenerateLast() {
    const last = this.chat.messages.findLast((m) => m.role === 'assistant');
    if (last) this.regenerate(last);
  }

  editLast() {
    const last = this.chat.messages.findLast((m) => m.role === 'user');
    if (last) this.views.get(last).edit();
  }

  // A question goes with its answers, an answer with the results of its tools.
  remove(message) {
    const {chat} = this, {messages} = chat, at = messages.indexOf(message);
    if (at < 0) return;
    let end = at + 1;
    while (end < messages.length && (message.role === 'user' ? messages[end].role !== 'user' : messages[end].role === 'tool')) end++;
    const answer = this.answers.get(chat);
    if (answer && messages.slice(at, end).includes(answer.message)) answer.stop();
    const removed = messages.splice(at, end - at);
    saveChat(chat);
    this.render();
    this.offerUndo(chat, () => messages.splice(at, 0, ...removed));
  }

  offerUndo(chat, restore) {
    toast(t('removed'), t('undo'), () => {
      restore();
      saveChat(chat);
      if (this.chat === chat) this.render();
    });
  }

  toolResults(message, results) {
    const fields = this.busy() ? null : this.host.fields();
    const {messages} = this.chat, at = messages.indexOf(message);
    if (!fields || at < 0) return;
    messages.splice(at + 1, 0, ...results.map(({id, text}) => ({role: 'tool', tool_call_id: id, content: text})));
    this.start(fields);
  }
}
