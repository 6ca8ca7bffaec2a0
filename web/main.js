// The page's frame: conversations at the left, the chat, panels at the right, keys, theme and language.

import {getJson} from './api.js';
import {BlocksPane} from './blocks.js';
import {Chat} from './chat.js';
import {$, h, icon, iconButton, isSend, toast} from './dom.js';
import {language, languageName, setLanguage, t, translate} from './i18n.js';
import {ServerPane} from './server.js';
import {drawSettings, focusBadSetting, requestFields, toolCount} from './settings.js';
import {apiKey, exportText, importChats, keepOpen, loadChats, loadSettings, newChat, openId, openStore, removeChat,
        restoreChat, saveChat, saveSettings, setApiKey, settings, titleOf} from './store.js';

const PANELS = ['settings', 'blocks', 'server'];
let chats = [];
let panel = '';
let models = [];
let renaming = '';

const narrow = () => matchMedia('(max-width: 859px)').matches;

const chat = new Chat({
  fields() {
    const fields = requestFields();
    if (!fields) {
      openPanel('settings');
      focusBadSetting();
      toast(t('fixSettings'));
    }
    return fields;
  },
  model: () => (models.includes(settings.model) ? settings.model : models[0] || 'minimind'),
  changed() {
    const current = chat.chat;
    if (current.messages.length && !chats.includes(current)) chats.unshift(current);
    keepOpen(current);
    drawChats();
    drawComposer();
  },
  needKey: askKey,
});
const panes = {blocks: new BlocksPane(), server: new ServerPane(), settings: {setOpen() {}, repaint() {}}};

// Theme and language --------------------------------------------------------------------------------------------------

const THEMES = ['auto', 'light', 'dark'];

const prefersDark = matchMedia('(prefers-color-scheme: dark)');

function applyTheme() {
  document.documentElement.dataset.theme = settings.theme === 'auto' ? (prefersDark.matches ? 'dark' : 'light') : settings.theme;
  panes.blocks.repaint();
}

function applyLanguage() {
  setLanguage(settings.lang);
  translate(document, {name: ''});
  const labels = {theme: t('theme', {name: t(settings.theme)}), lang: t('language', {name: languageName[language()]})};
  for (const [id, text] of Object.entries(labels)) {
    $(id).title = text;
    $(id).setAttribute('aria-label', text);
  }
  $('lang').textContent = language() ? 'EN' : '中';
  drawModels();
  drawSettings(settingChanged);
  panes.blocks.repaint();
  panes.server.repaint();
  drawKeys();
}

function settingChanged(name) {
  if (name === 'theme') applyTheme();
  if (name === 'lang' || name === 'theme') {
    const focus = document.activeElement && document.activeElement.id;
    applyLanguage();
    chat.render();
    if (focus && $(focus)) $(focus).focus();
  }
  drawComposer();
}

function choose(name, value) {
  settings[name] = value;
  saveSettings();
  settingChanged(name);
}

// Conversations -------------------------------------------------------------------------------------------------------

function drawChats() {
  const list = $('chats');
  if (renaming && document.activeElement.className === 'rename') return;
  const focus = list.contains(document.activeElement) ? document.activeElement.dataset.id : '';
  const sorted = [...chats].sort((a, b) => b.updated - a.updated);
  list.replaceChildren(...sorted.map((item) => {
    const title = titleOf(item) || t('untitled'), current = item === chat.chat;
    if (renaming === item.id) return h('li', {class: 'current'}, renameField(item));
    return h('li', {class: current ? 'current' : ''},
      h('button', {class: 'open', 'data-id': item.id, 'aria-current': current ? 'true' : null, title, onclick: () => openChat(item)},
        chat.busy(item) ? h('i', {class: 'dot', role: 'img', 'aria-label': t('running')}) : '', h('span', null, title)),
      iconButton('pen', `${t('rename')}: ${title}`, () => { renaming = item.id; drawChats(); }),
      iconButton('trash', `${t('remove')}: ${title}`, () => deleteChat(item)));
  }));
  if (!chats.length) list.append(h('li', {class: 'empty'}, t('noChats')));
  if (focus) {
    const button = list.querySelector(`[data-id="${CSS.escape(focus)}"]`);
    if (button) button.focus();
  }
  const title = chat.chat.messages.length ? titleOf(chat.chat) : '';
  $('title').textContent = title || 'minimind';
  document.title = title ? title + ' · minimind' : 'minimind';
}

function renameField(item) {
  const input = h('input', {class: 'rename', value: titleOf(item), 'aria-label': t('chatTitle'), maxlength: '200'});
  const close = (keep) => {
    if (renaming !== item.id) return;
    renaming = '';
    if (keep && input.value.trim()) {
      item.title = input.value.trim();
      saveChat(item);
    }
    drawChats();
    const button = $('chats').querySelector(`[data-id="${CSS.escape(item.id)}"]`);
    if (button) button.focus();
  };
  input.addEventListener('keydown', (event) => {
    if (isSend(event)) close(true);
    if (event.key === 'Escape') { event.stopPropagation(); close(false); }
  });
  input.addEventListener('blur', () => close(true));
  setTimeout(() => { input.focus(); input.select(); });
  return input;
}

function openChat(item) {
  chat.show(item);
  if (narrow()) showSide(false);
  chat.focus();
}

function deleteChat(item) {
  chat.stop(item);
  removeChat(item);
  chats = chats.filter((other) => other !== item);
  if (chat.chat === item) chat.show(newChat());
  else drawChats();
  toast(t('removed'), t('undo'), () => {
    chats.push(item);
    restoreChat(item);
    openChat(item);
  });
}

function startChat() {
  openChat(newChat());
}

function exportAll() {
  if (!chats.length) { toast(t('nothingToExport')); return; }
  const url = URL.createObjectURL(new Blob([exportText(chats)], {type: 'application/json'}));
  h('a', {href: url, download: `minimind-${new Date().toISOString().slice(0, 10)}.json`}).click();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
}

async function importFile() {
  const file = $('import-file').files[0];
  $('import-file').value = '';
  if (!file) return;
  const added = importChats(await file.text(), new Set(chats.map((c) => c.id)));
  if (!added) { toast(t('importBad')); return; }
  chats.push(...added);
  added.forEach(saveChat);
  toast(t('imported', {n: added.length}));
  drawChats();
}

// Panels --------------------------------------------------------------------------------------------------------------

function showSide(open) {
  $('app').classList.toggle('side-on', open);
  $('app').classList.toggle('side-off', !open);
  $('side-open').setAttribute('aria-expanded', String(open));
  $('side').inert = !open;
  updateShade();
}

function openPanel(name) {
  panel = name;
  $('panel').hidden = !name;
  $('panel').dataset.pane = name;
  for (const id of PANELS) {
    const on = id === name;
    $('pane-' + id).hidden = !on;
    $('tab-' + id).setAttribute('aria-selected', String(on));
    $('tab-' + id).tabIndex = on ? 0 : -1;
    document.querySelector(`[data-panel="${id}"]`).setAttribute('aria-expanded', String(on));
    panes[id].setOpen(on);
  }
  if (name && narrow()) showSide(false);
  updateShade();
}

function closePanel() {
  const opener = document.querySelector(`[data-panel="${panel}"]`);
  openPanel('');
  if (opener) opener.focus();
}

function togglePanel(name) {
  if (panel === name) { closePanel(); return; }
  openPanel(name);
  $('tab-' + name).focus({preventScroll: true});
}

// On a small screen an open drawer covers the chat.
function updateShade() {
  const drawer = (narrow() && $('app').classList.contains('side-on')) || (panel && matchMedia('(max-width: 1179px)').matches);
  $('shade').hidden = !drawer;
  $('main').inert = Boolean(drawer);
}

// Composer ------------------------------------------------------------------------------------------------------------

function drawComposer() {
  const busy = chat.busy(), input = $('input');
  $('send').hidden = busy;
  $('stop').hidden = !busy;
  $('send').disabled = !input.value.trim();
  $('think').setAttribute('aria-pressed', String(settings.think));
  const tools = toolCount();
  $('tools-chip').hidden = !tools;
  $('tools-chip').lastElementChild.textContent = t('toolsOn', {n: tools});
  $('schema-chip').hidden = !settings.schema.trim();
}

function fitInput() {
  const input = $('input');
  input.style.height = 'auto';
  input.style.height = Math.min(input.scrollHeight, 240) + 'px';
}

function send() {
  const input = $('input');
  if (!chat.send(input.value)) return;
  input.value = '';
  fitInput();
  drawComposer();
}

// Server --------------------------------------------------------------------------------------------------------------

async function loadModels() {
  try {
    const {data} = await getJson('/v1/models');
    models = (Array.isArray(data) ? data : []).map((m) => String(m.id)).slice(0, 100);
    if (models.length && typeof data[0].engine === 'string') panes.server.about = data[0].engine;
  } catch (error) {
    if (error.kind === 'key') askKey(loadModels);
    else toast(error.message, t('retry'), loadModels);
  }
  drawModels();
}

function drawModels() {
  const box = $('model-box');
  if (models.length < 2) { box.replaceChildren(models[0] || 'minimind'); return; }
  const select = h('select', {'aria-label': t('model'), onchange: () => choose('model', select.value)},
                   models.map((id) => h('option', {value: id}, id)));
  select.value = models.includes(settings.model) ? settings.model : models[0];
  box.replaceChildren(select);
}

function askKey(then) {
  const dialog = $('auth');
  if (dialog.open) return;
  $('auth-bad').hidden = !apiKey();
  $('auth-key').value = '';
  dialog.onkey = then;
  dialog.showModal();
}

function useKey() {
  const key = $('auth-key').value.trim();
  if (!key) { $('auth-key').focus(); return; }
  setApiKey(key, $('auth-keep').checked);
  $('auth').close();
  $('auth').onkey();
  if (!models.length) loadModels();
}

// Keys ----------------------------------------------------------------------------------------------------------------

const ALT = {KeyN: ['newChat', startChat], KeyL: ['chats', () => showSide(!$('app').classList.contains('side-on'))],
             KeyS: ['settings', () => togglePanel('settings')], KeyB: ['blocks', () => togglePanel('blocks')],
             KeyM: ['server', () => togglePanel('server')], KeyR: ['keyRegenerate', () => chat.regenerateLast()],
             KeyI: ['keyInput', () => $('input').focus()], Slash: ['keyHelp', () => $('keys').showModal()]};

function drawKeys() {
  const rows = [['Enter', t('keySend')], ['Shift + Enter', t('keyNewline')], ['Esc', t('keyStop')], ['↑', t('keyLast')],
                ...Object.entries(ALT).map(([code, [key]]) => ['Alt + ' + (code === 'Slash' ? '/' : code[3]), t(key)])];
  $('keys-list').replaceChildren(...rows.flatMap(([keys, text]) => [
    h('dt', null, ...keys.split(' + ').flatMap((key, i) => [i ? ' + ' : '', h('kbd', null, key)])), h('dd', null, text)]));
}

function onKey(event) {
  if (event.isComposing || document.querySelector('dialog[open]')) return;
  if (event.key === 'Escape') {
    if (chat.busy()) chat.stop();
    else if (panel) closePanel();
    else if (narrow()) showSide(false);
    return;
  }
  const entry = event.altKey && !event.ctrlKey && !event.metaKey && ALT[event.code];
  if (entry) {
    event.preventDefault();
    entry[1]();
  }
}

function onInputKey(event) {
  if (isSend(event)) {
    event.preventDefault();
    send();
  } else if (event.key === 'ArrowUp' && !$('input').value) {
    event.preventDefault();
    chat.editLast();
  }
}

function onTabKey(event) {
  const step = {ArrowRight: 1, ArrowLeft: -1}[event.key];
  if (!step) return;
  event.preventDefault();
  const next = PANELS[(PANELS.indexOf(panel) + step + PANELS.length) % PANELS.length];
  openPanel(next);
  $('tab-' + next).focus();
}

// Start ---------------------------------------------------------------------------------------------------------------

function start() {
  for (const button of document.querySelectorAll('[data-icon]')) button.prepend(icon(button.dataset.icon));
  openStore((key) => toast(t(key)));
  loadSettings();
  chats = loadChats();
  applyTheme();
  applyLanguage();
  showSide(!narrow());
  openPanel('');
  chat.show(chats.find((c) => c.id === openId()) || newChat());

  const on = (id, type, handler) => $(id).addEventListener(type, handler);
  on('new', 'click', startChat);
  on('export', 'click', exportAll);
  on('import', 'click', () => $('import-file').click());
  on('import-file', 'change', importFile);
  on('theme', 'click', () => choose('theme', THEMES[(THEMES.indexOf(settings.theme) + 1) % THEMES.length]));
  on('lang', 'click', () => choose('lang', language() ? 'en' : 'zh'));
  on('keys-open', 'click', () => $('keys').showModal());
  on('keys-close', 'click', () => $('keys').close());
  on('side-open', 'click', () => {
    const open = !$('app').classList.contains('side-on');
    showSide(open);
    if (open && narrow()) $('side-close').focus();
  });
  on('side-close', 'click', () => { showSide(false); $('side-open').focus(); });
  on('shade', 'click', () => { if (panel) closePanel(); if (narrow()) showSide(false); });
  on('panel-close', 'click', closePanel);
  for (const button of document.querySelectorAll('[data-panel]')) button.addEventListener('click', () => togglePanel(button.dataset.panel));
  for (const id of PANELS) {
    on('tab-' + id, 'click', () => openPanel(id));
    on('tab-' + id, 'keydown', onTabKey);
  }
  on('input', 'input', () => { fitInput(); drawComposer(); });
  on('input', 'keydown', onInputKey);
  on('composer', 'click', (event) => { if (event.target === $('composer')) $('input').focus(); });
  on('send', 'click', send);
  on('stop', 'click', () => { chat.stop(); chat.focus(); });
  on('think', 'click', () => { choose('think', !settings.think); drawSettings(settingChanged); });
  on('tools-chip', 'click', () => { openPanel('settings'); $('set-tools').focus(); });
  on('schema-chip', 'click', () => { openPanel('settings'); $('set-schema').focus(); });
  on('auth-ok', 'click', useKey);
  on('auth-key', 'keydown', (event) => { if (event.key === 'Enter') useKey(); });
  on('auth-cancel', 'click', () => $('auth').close());
  document.addEventListener('keydown', onKey);
  prefersDark.addEventListener('change', applyTheme);
  let wasNarrow = narrow();
  addEventListener('resize', () => {
    if (narrow() !== wasNarrow) { wasNarrow = narrow(); showSide(!wasNarrow); }
    updateShade();
  });
  // Another tab changed a conversation.
  addEventListener('storage', (event) => {
    if (!event.key || !event.key.startsWith('minimind.chat.') || chats.some((c) => chat.busy(c))) return;
    const current = chat.chat, mine = event.key.endsWith('.' + current.id);
    chats = loadChats().map((c) => (c.id === current.id && !mine ? current : c));
    const fresh = chats.find((c) => c.id === current.id);
    if (mine && fresh) chat.show(fresh);
    else drawChats();
  });
  chat.focus();
  loadModels();
}

start();
