// The settings panel, and the request fields that follow from it.

import {$, h} from './dom.js';
import {languageName, t} from './i18n.js';
import {NUMBERS, resetSettings, saveSettings, settings} from './store.js';

function parse(text) {
  try {
    return {value: JSON.parse(text)};
  } catch (error) {
    return {problem: t('badJson', {text: String(error.message).replace(/^JSON\.parse: /, '')})};
  }
}

// What is wrong with a setting; '' if nothing.
function problemOf(name) {
  const text = settings[name];
  if (typeof text !== 'string' || !text.trim()) return '';
  if (NUMBERS[name]) {
    const {min, max, step} = NUMBERS[name], value = Number(text);
    const good = value >= min && value <= max && (step !== 1 || Number.isInteger(value));
    return good ? '' : t('badRange', {a: min, b: max});
  }
  if (name === 'tools') {
    const {value, problem} = parse(text);
    if (problem) return problem;
    const good = Array.isArray(value) && value.every((x) => x && x.type === 'function' && x.function && typeof x.function.name === 'string');
    return good ? '' : t('badTools');
  }
  if (name === 'schema') {
    const {value, problem} = parse(text);
    return problem || (value && typeof value === 'object' && !Array.isArray(value) ? '' : t('badSchema'));
  }
  return '';
}

export function toolCount() {
  return settings.tools.trim() && !problemOf('tools') ? JSON.parse(settings.tools).length : 0;
}

// Fields of the request, or null when a setting must be corrected first.
export function requestFields() {
  const fields = {};
  for (const name of [...Object.keys(NUMBERS), 'tools', 'schema']) {
    if (problemOf(name)) return null;
    if (NUMBERS[name] && settings[name].trim()) fields[name] = Number(settings[name]);
  }
  if (toolCount()) {
    fields.tools = JSON.parse(settings.tools);
    if (settings.tool_choice !== 'auto') fields.tool_choice = settings.tool_choice;
  }
  if (settings.schema.trim()) {
    fields.response_format = {type: 'json_schema', json_schema: {name: 'answer', strict: true, schema: JSON.parse(settings.schema)}};
  }
  if (settings.think) fields.open_thinking = true;
  return fields;
}

const exampleTools = () => JSON.stringify([{type: 'function', function: {
  name: 'get_weather', description: t('exampleTool'),
  parameters: {type: 'object', properties: {city: {type: 'string', description: t('exampleCity')}}, required: ['city']},
}}], null, 2);

const exampleSchema = () => JSON.stringify({
  type: 'object', properties: {name: {type: 'string'}, age: {type: 'integer', minimum: 0}}, required: ['name', 'age'],
  additionalProperties: false,
}, null, 2);

// onchange(name) after a setting changed; it may draw the panel again (language).
export function drawSettings(onchange) {
  const set = (name, value) => {
    settings[name] = value;
    saveSettings();
    onchange(name);
  };
  const checked = (name, input) => {  // a field with its problem below it
    const problem = h('span', {class: 'bad', id: 'bad-' + name, role: 'status'});
    const check = () => {
      const text = problemOf(name);
      problem.textContent = text;
      input.setAttribute('aria-invalid', text ? 'true' : 'false');
    };
    input.setAttribute('aria-describedby', problem.id);
    input.addEventListener('input', () => { set(name, input.value); check(); });
    check();
    return problem;
  };
  const number = (name) => {
    const {min, max, step} = NUMBERS[name];
    const input = h('input', {id: 'set-' + name, inputmode: step === 1 && min >= 0 ? 'numeric' : 'decimal', value: settings[name],
                              placeholder: t('setDefault'), autocomplete: 'off', title: `${min} … ${max > 9e5 ? '' : max}`});
    const problem = checked(name, input);
    return h('label', {class: 'field'}, h('span', null, t(name)), input, problem);
  };
  const json = (name, hint, example) => {
    const area = h('textarea', {id: 'set-' + name, class: 'code-input', rows: '4', spellcheck: 'false', placeholder: t(hint),
                                value: settings[name]});
    const problem = checked(name, area);
    const insert = h('button', {class: 'link', type: 'button', onclick: () => {
      area.value = example();
      area.dispatchEvent(new Event('input'));
      area.focus();
    }}, t('example'));
    const label = h('label', {for: area.id}, t(name === 'tools' ? 'setTools' : 'setSchema'));
    return h('div', {class: 'field'}, h('div', {class: 'row'}, label, h('span', {class: 'grow'}), insert), area, problem);
  };
  const choice = (name, label, options) => {
    const select = h('select', {id: 'set-' + name, onchange: (event) => set(name, event.target.value)},
      options.map(([value, text]) => h('option', {value}, text)));
    select.value = settings[name];
    return h('label', {class: 'field'}, h('span', null, label), select);
  };
  const system = h('textarea', {id: 'set-system', rows: '3', placeholder: t('setSystemHint'), value: settings.system,
                                oninput: (event) => set('system', event.target.value)});
  const think = h('input', {type: 'checkbox', id: 'set-think', checked: settings.think,
                            onchange: (event) => set('think', event.target.checked)});
  $('pane-settings').replaceChildren(
    h('section', null, h('h3', null, t('setAnswer')),
      h('label', {class: 'field'}, h('span', null, t('setSystem')), system),
      h('label', {class: 'check'}, think, h('span', null, t('setThink')))),
    h('section', null, h('h3', null, t('setSampling')), h('p', {class: 'muted'}, t('setEmpty')),
      h('div', {class: 'fields'}, Object.keys(NUMBERS).map(number))),
    h('section', null, h('h3', null, t('setStructure')), json('tools', 'setToolsHint', exampleTools),
      choice('tool_choice', t('setToolChoice'), [['auto', t('choiceAuto')], ['none', t('choiceNone')], ['required', t('choiceRequired')]]),
      json('schema', 'setSchemaHint', exampleSchema)),
    h('section', null, h('h3', null, t('setPage')), h('div', {class: 'fields'},
      choice('theme', t('setTheme'), ['auto', 'light', 'dark'].map((x) => [x, t(x)])),
      choice('lang', t('setLanguage'), [['auto', t('auto')], ['en', languageName[0]], ['zh', languageName[1]]]))),
    h('button', {class: 'plain', onclick: () => { resetSettings(); drawSettings(onchange); onchange('all'); }}, t('reset')));
}

export function focusBadSetting() {
  const field = document.querySelector('#pane-settings [aria-invalid="true"]');
  if (field) field.focus();
}
