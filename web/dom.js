// Small helpers to make elements. Text enters the page only as text nodes and attributes, never as HTML.

const SVG = 'http://www.w3.org/2000/svg';
export const $ = (id) => document.getElementById(id);

function fill(node, props, children) {
  for (const [name, value] of Object.entries(props || {})) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith('on')) node.addEventListener(name.slice(2), value);
    else if (name === 'value' || name === 'checked' || name === 'disabled') node[name] = value;
    else node.setAttribute(name, value === true ? '' : value);
  }
  for (const child of children.flat()) {
    if (child !== null && child !== undefined && child !== false && child !== '') node.append(child);
  }
  return node;
}

// h('button', {class: 'icon', onclick: f}, 'text', node, [nodes])
export const h = (tag, props, ...children) => fill(document.createElement(tag), props, children);
export const svg = (tag, props, ...children) => fill(document.createElementNS(SVG, tag), props, children);
export const icon = (name) => svg('svg', {'aria-hidden': 'true'}, svg('use', {href: '#i-' + name}));

export function iconButton(name, label, onclick, extra) {
  return h('button', {class: 'icon', type: 'button', 'aria-label': label, title: label, onclick, ...extra}, icon(name));
}

// Enter that sends: not with Shift, and not the one that ends an input method's composition.
export const isSend = (event) => event.key === 'Enter' && !event.shiftKey && !event.altKey && !event.isComposing && event.keyCode !== 229;

export async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {  // plain http from another machine: no clipboard interface
    const area = h('textarea', {class: 'vh', value: text, 'aria-hidden': 'true'});
    (document.querySelector('dialog[open]') || document.body).append(area);
    area.select();
    document.execCommand('copy');
    area.remove();
  }
}

export function copyButton(label, done, text) {
  const button = iconButton('copy', label, async () => {
    const focus = document.activeElement;
    await copyText(text());
    if (focus) focus.focus();
    announce(done);
    button.replaceChildren(icon('check'));
    setTimeout(() => button.replaceChildren(icon('copy')), 1500);
  });
  return button;
}

// For screen readers.
export function announce(text) {
  $('live').textContent = '';
  setTimeout(() => { $('live').textContent = text; }, 50);
}

let toastTimer = 0;
export function toast(text, action, onaction) {
  const box = $('toast');
  const close = () => { box.hidden = true; };
  box.replaceChildren(h('span', null, text));
  if (action) box.append(h('button', {class: 'link', onclick: () => { close(); onaction(); }}, action));
  box.hidden = false;
  clearTimeout(toastTimer);
  toastTimer = setTimeout(close, action ? 8000 : 4000);
}
