// Colours for code: comments, strings, numbers, keywords, calls. One pass of one regular expression, linear in the text.

import {h} from './dom.js';

const words = (text) => new Set(text.split(' '));
const C_WORDS = words('abstract as async await auto bool boolean break case catch char class concept const constexpr ' +
  'continue default delete do double else enum export extends extern false final ' +
  'finally float fn for from func function go if impl implements import in include inline int interface ' +
  'let long loop match mod module mut namespace new nil null nullptr of operator override package private ' +
  'protected pub public ref return self short signed size_t sizeof static struct super switch template this ' +
  'throw throws trait true try type typedef typename typeof union unsigned use using var virtual void ' +
  'where while yield');
const HASH_WORDS = words('and as assert async await break case class continue def del do done elif else end ' +
  'except export False finally fi for from function global if import in is lambda local module next nil None ' +
  'nonlocal not or pass raise require return self set then True try unless until while with yield true false ' +
  'null echo exit');
const SQL_WORDS = words('add all alter and as asc between by case create default delete desc distinct drop else end ' +
  'exists foreign from full group having in index inner insert into is join key left like limit not null offset on ' +
  'or order outer primary references right select set table then union unique update values view when where with');

const STRING = /"(?:[^"\\\n]|\\.)*"?|'(?:[^'\\\n]|\\.)*'?/.source;
const NUMBER = /\b(?:0[xX][\da-fA-F_]+|\d[\d_]*(?:\.\d+)?(?:[eE][+-]?\d+)?)\w*/.source;
const WORD = /[A-Za-z_$][\w$]*/.source;
const rule = (comment, string) => new RegExp(`(${comment})|(${string})|(${NUMBER})|(${WORD})`, 'g');
const FAMILY = {
  c: {rule: rule('\\/\\/[^\\n]*|\\/\\*[^]*?(?:\\*\\/|$)', STRING + '|`(?:[^`\\\\]|\\\\[^])*`?'), words: C_WORDS},
  hash: {rule: rule('#[^\\n]*', '"""[^]*?(?:"""|$)|\'\'\'[^]*?(?:\'\'\'|$)|' + STRING), words: HASH_WORDS},
  sql: {rule: rule('--[^\\n]*|\\/\\*[^]*?(?:\\*\\/|$)', STRING), words: SQL_WORDS, fold: true},
  markup: {rule: rule('<!--[^]*?(?:-->|$)', STRING), words: new Set(), tags: true},
};
const LANGUAGE = {};
for (const [family, names] of Object.entries({
  c: 'c h cc cpp c++ cxx cu cuda java js javascript jsx mjs ts typescript tsx json jsonc go rust rs kotlin swift scala ' +
    'cs csharp php dart css scss',
  hash: 'py python sh bash shell zsh console rb ruby yaml yml toml ini make makefile cmake dockerfile r perl',
  sql: 'sql lua', markup: 'html xml svg vue'})) {
  for (const name of names.split(' ')) LANGUAGE[name] = FAMILY[family];
}
const LIMIT = 60000;  // characters; longer code stays plain

// A list of text strings and <span>s.
export function highlight(code, language) {
  const family = LANGUAGE[(language || '').toLowerCase()];
  if (!family || code.length > LIMIT) return [code];
  const out = [];
  let end = 0;
  for (const match of code.matchAll(family.rule)) {
    const [text, comment, string, number, word] = match;
    const after = match.index + text.length;
    let kind = '';
    if (comment) kind = 'hl-comment';
    else if (string) kind = 'hl-string';
    else if (number) kind = 'hl-number';
    else if (word && family.words.has(family.fold ? word.toLowerCase() : word)) kind = 'hl-word';
    else if (word && family.tags && /[</]/.test(code[match.index - 1] || '')) kind = 'hl-word';
    else if (word && code[after] === '(') kind = 'hl-call';
    if (!kind) continue;
    if (match.index > end) out.push(code.slice(end, match.index));
    out.push(h('span', {class: kind}, text));
    end = after;
  }
  if (end < code.length) out.push(code.slice(end));
  return out;
}
