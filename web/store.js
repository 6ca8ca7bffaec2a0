// What the browser keeps: settings, and one entry per conversation. Everything read back is checked: the storage and
// imported files are input from outside.

const PREFIX = 'minimind.';
let onproblem = () => {};
let tab = '';     // the API key of this tab
let area = null;  // localStorage, or a stand-in where the browser keeps nothing

function standIn() {
  const map = new Map();
  return {getItem: (k) => map.get(k) ?? null, setItem: (k, v) => map.set(k, v), removeItem: (k) => map.delete(k),
          key: (i) => [...map.keys()][i] ?? null, get length() { return map.size; }};
}

export function openStore(problem) {
  onproblem = problem;
  try {
    area = localStorage;
    if (!area.length) area.setItem(PREFIX + 'settings', '{}');
  } catch {
    area = standIn();
    onproblem('errNoStorage');
  }
  tab = readTab('key');
}

// What this tab alone keeps, over a reload.
function readTab(key) {
  try {
    return sessionStorage.getItem(PREFIX + key) || '';
  } catch {
    return '';
  }
}

function writeTab(key, value) {
  try {
    sessionStorage.setItem(PREFIX + key, value);
  } catch {
    // then a reload forgets it
  }
}

function read(key) {
  try {
    return JSON.parse(area.getItem(PREFIX + key));
  } catch {
    return null;
  }
}

function write(key, value) {
  try {
    area.setItem(PREFIX + key, JSON.stringify(value));
  } catch {
    onproblem('errStorage');
  }
}

export const newId = () => Array.from(crypto.getRandomValues(new Uint32Array(2)), (x) => x.toString(36)).join('');

// Settings ------------------------------------------------------------------------------------------------------------

export const NUMBERS = {  // sent when not empty
  temperature: {min: 0, max: 2, step: 0.05}, top_p: {min: 0, max: 1, step: 0.01}, top_k: {min: 0, max: 1000000, step: 1},
  min_p: {min: 0, max: 1, step: 0.01}, presence_penalty: {min: -2, max: 2, step: 0.1},
  frequency_penalty: {min: -2, max: 2, step: 0.1}, repetition_penalty: {min: 0.1, max: 2, step: 0.05},
  max_tokens: {min: 1, max: 1000000, step: 1}, seed: {min: 0, max: Number.MAX_SAFE_INTEGER, step: 1},
};
const DEFAULTS = {lang: 'auto', theme: 'auto', model: '', system: '', think: false, tools: '', tool_choice: 'auto', schema: ''};
for (const name of Object.keys(NUMBERS)) DEFAULTS[name] = '';

export const settings = {...DEFAULTS};

export function loadSettings() {
  const kept = read('settings') || {};
  for (const name of Object.keys(DEFAULTS)) {
    if (typeof kept[name] === typeof DEFAULTS[name]) settings[name] = kept[name];
  }
}

export const saveSettings = () => write('settings', settings);

export function resetSettings() {
  const {lang, theme, model} = settings;
  Object.assign(settings, DEFAULTS, {lang, theme, model});
  saveSettings();
}

// API key: for this tab, or for this browser if the user wants so. Never part of an export.
export const apiKey = () => tab || area.getItem(PREFIX + 'key') || '';

export function setApiKey(key, keep) {
  tab = key;
  writeTab('key', key);
  try {
    if (keep) area.setItem(PREFIX + 'key', key);
    else area.removeItem(PREFIX + 'key');
  } catch {
    // then this tab alone has it
  }
}

// Conversations -------------------------------------------------------------------------------------------------------
//
// {id, title, updated, messages}; a message:
//   {role: 'user', content}
//   {role: 'assistant', content, reasoning, reasoning_ms, tool_calls: [{id, name, arguments}], finish, error, stats}
//   {role: 'tool', tool_call_id, content}

const text = (value, limit = 4e6) => (typeof value === 'string' ? value.slice(0, limit) : '');
const number = (value) => (Number.isFinite(value) && value >= 0 ? value : 0);

function cleanMessage(raw) {
  if (!raw || typeof raw !== 'object') return null;
  if (raw.role === 'user') return {role: 'user', content: text(raw.content)};
  if (raw.role === 'tool') return {role: 'tool', tool_call_id: text(raw.tool_call_id, 200), content: text(raw.content)};
  if (raw.role !== 'assistant') return null;
  const out = {role: 'assistant', content: text(raw.content), reasoning: text(raw.reasoning),
               reasoning_ms: number(raw.reasoning_ms), tool_calls: [], finish: text(raw.finish, 40)};
  for (const call of Array.isArray(raw.tool_calls) ? raw.tool_calls.slice(0, 100) : []) {
    if (call && typeof call === 'object') {
      out.tool_calls.push({id: text(call.id, 200), name: text(call.name, 200), arguments: text(call.arguments)});
    }
  }
  if (typeof raw.error === 'string' && raw.error) out.error = text(raw.error, 1000);
  if (raw.stats && typeof raw.stats === 'object') {
    out.stats = {};
    for (const key of ['ttft', 'rate', 'completion', 'prompt', 'cached']) {
      if (Number.isFinite(raw.stats[key])) out.stats[key] = number(raw.stats[key]);
    }
  }
  return out;
}

function cleanChat(raw) {
  if (!raw || typeof raw !== 'object' || !Array.isArray(raw.messages)) return null;
  const messages = raw.messages.slice(0, 10000).map(cleanMessage).filter(Boolean);
  return {id: /^[\w-]{1,40}$/.test(raw.id) ? raw.id : newId(), title: text(raw.title, 200), updated: number(raw.updated) || Date.now(), messages};
}

export const newChat = () => ({id: newId(), title: '', updated: Date.now(), messages: []});

export function loadChats() {
  const out = [];
  for (let i = 0; i < area.length; i++) {
    const key = area.key(i);
    if (!key || !key.startsWith(PREFIX + 'chat.')) continue;
    const chat = cleanChat(read(key.slice(PREFIX.length)));
    if (chat && chat.messages.length) out.push(chat);
  }
  return out.sort((a, b) => b.updated - a.updated);
}

const removed = new WeakSet();  // an answer that ends later must not bring its conversation back

export function saveChat(chat) {
  if (removed.has(chat)) return;
  if (chat.messages.length) write('chat.' + chat.id, chat);
  else area.removeItem(PREFIX + 'chat.' + chat.id);
}

export function removeChat(chat) {
  removed.add(chat);
  area.removeItem(PREFIX + 'chat.' + chat.id);
}

export function restoreChat(chat) {
  removed.delete(chat);
  saveChat(chat);
}

// The conversation that this tab has open; '' for a new one.
export const openId = () => readTab('open');
export const keepOpen = (chat) => writeTab('open', chat.messages.length ? chat.id : '');

export function titleOf(chat) {
  if (chat.title) return chat.title;
  const first = chat.messages.find((m) => m.role === 'user');
  return first ? first.content.trim().replace(/\s+/g, ' ').slice(0, 60) : '';
}

export const exportText = (chats) => JSON.stringify({format: 'minimind-chats', version: 1, conversations: chats}, null, 1);

// The conversations of an exported file; null if it is none. Ids that exist already are replaced by new ones.
export function importChats(json, taken) {
  let data;
  try {
    data = JSON.parse(json);
  } catch {
    return null;
  }
  if (!data || data.format !== 'minimind-chats' || !Array.isArray(data.conversations)) return null;
  const chats = data.conversations.slice(0, 10000).map(cleanChat).filter((c) => c && c.messages.length);
  for (const chat of chats) {
    if (taken.has(chat.id)) chat.id = newId();
    taken.add(chat.id);
  }
  return chats;
}
