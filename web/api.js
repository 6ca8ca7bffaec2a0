// The server: requests, the event stream, and errors as one clear line.

import {apiKey} from './store.js';
import {t} from './i18n.js';

// kind: network, key, busy, server, stream, cut, format. `text` is for people; retryAfter in seconds where known.
export class ApiError extends Error {
  constructor(kind, text, retryAfter = 0) {
    super(text);
    this.kind = kind;
    this.retryAfter = retryAfter;
  }
}

export async function request(path, options = {}) {
  const headers = {...options.headers};
  if (apiKey()) headers.Authorization = 'Bearer ' + apiKey();
  let response;
  try {
    response = await fetch(path, {...options, headers, cache: 'no-store'});
  } catch (error) {
    if (error.name === 'AbortError') throw error;
    throw new ApiError('network', t('errNetwork'));
  }
  if (response.ok) return response;
  if (response.status === 401) throw new ApiError('key', t('errKey'));
  if (response.status === 429) {
    const seconds = Math.ceil(Number(response.headers.get('Retry-After')) || 0);
    throw new ApiError('busy', seconds ? t('errBusyIn', {s: seconds}) : t('errBusy'), seconds);
  }
  throw new ApiError('server', t('errServer', {code: response.status, text: await errorText(response)}));
}

async function errorText(response) {
  const body = await response.text().catch(() => '');
  try {
    const {error} = JSON.parse(body);
    const message = typeof error === 'string' ? error : error.message;
    if (message) return oneLine(message);
  } catch { /* not OpenAI's shape */ }
  const plain = /<\w/.test(body) ? '' : body;
  return oneLine(plain || response.statusText || '?');
}

const oneLine = (text) => String(text).replace(/\s+/g, ' ').trim().slice(0, 300);

export async function getJson(path, signal) {
  const response = await request(path, {signal});
  try {
    return await response.json();
  } catch {
    throw new ApiError('format', t('errFormat'));
  }
}

export const getText = async (path, signal) => (await request(path, {signal})).text();

// The `data:` lines of server-sent events, however the bytes were cut.
export async function* events(body) {
  const reader = body.getReader(), decoder = new TextDecoder();
  let rest = '', data = [];
  try {
    for (;;) {
      const {done, value} = await reader.read();
      rest += done ? decoder.decode() + '\n\n' : decoder.decode(value, {stream: true});
      let start = 0;
      for (let end = rest.indexOf('\n', start); end >= 0; end = rest.indexOf('\n', start)) {
        const line = rest.slice(start, end).replace(/\r$/, '');
        start = end + 1;
        if (line.startsWith('data:')) data.push(line.slice(line[5] === ' ' ? 6 : 5));
        else if (!line && data.length) { yield data.join('\n'); data = []; }
      }
      rest = rest.slice(start);
      if (done) return;
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

// Streams one chat completion. onchunk gets every parsed chunk; returns after [DONE]. A stream that ends without it is
// an error of kind 'cut'.
export async function streamChat(body, signal, onchunk) {
  const response = await request('/v1/chat/completions', {
    method: 'POST', signal, headers: {'Content-Type': 'application/json', Accept: 'text/event-stream'},
    body: JSON.stringify(body),
  });
  if (!(response.headers.get('Content-Type') || '').includes('text/event-stream')) {
    throw new ApiError('format', t('errFormat'));
  }
  try {
    for await (const data of events(response.body)) {
      if (data === '[DONE]') return;
      let chunk;
      try {
        chunk = JSON.parse(data);
      } catch {
        throw new ApiError('format', t('errFormat'));
      }
      if (chunk && chunk.error) {
        throw new ApiError('stream', t('errStream', {text: oneLine(chunk.error.message || chunk.error)}));
      }
      if (chunk && typeof chunk === 'object') onchunk(chunk);
    }
  } catch (error) {
    if (error.name === 'AbortError' || error instanceof ApiError) throw error;
    throw new ApiError('cut', t('errCut'));
  }
  throw new ApiError('cut', t('errCut'));
}
