// Texts of the page: English and Chinese side by side, so that neither can miss one.

const TEXT = {
  skip: ['Skip to the message box', '跳到输入框'],
  chats: ['Conversations', '对话列表'],
  newChat: ['New chat', '新对话'],
  untitled: ['New chat', '新对话'],
  noChats: ['Conversations stay in this browser.', '对话只保存在本浏览器中。'],
  exportAll: ['Export all conversations', '导出全部对话'],
  importFile: ['Import conversations', '导入对话'],
  imported: ['{n} conversations imported', '已导入 {n} 个对话'],
  importBad: ['This file holds no conversations of this page.', '该文件不是本页面导出的对话。'],
  nothingToExport: ['There is nothing to export yet.', '还没有可导出的对话。'],
  rename: ['Rename', '重命名'],
  chatTitle: ['Title of the conversation', '对话标题'],
  remove: ['Delete', '删除'],
  removed: ['Deleted.', '已删除。'],
  undo: ['Undo', '撤销'],
  running: ['answering', '正在回答'],
  shortcuts: ['Keyboard shortcuts', '键盘快捷键'],
  theme: ['Theme: {name}', '主题：{name}'],
  auto: ['automatic', '自动'],
  light: ['light', '浅色'],
  dark: ['dark', '深色'],
  language: ['Language: {name}', '语言：{name}'],
  close: ['Close', '关闭'],
  cancel: ['Cancel', '取消'],
  model: ['Model', '模型'],
  settings: ['Settings', '设置'],
  blocks: ['KV blocks', 'KV 块'],
  server: ['Server', '服务器'],
  panel: ['Side panel', '侧栏'],
  jump: ['Go to the latest message', '回到最新消息'],
  message: ['Message', '消息'],
  placeholder: ['Write a message', '输入消息'],
  hint: ['Small models make mistakes. Check what matters.', '小模型会出错，重要内容请核对。'],
  think: ['Think', '思考'],
  toolsOn: ['{n} tools', '{n} 个工具'],
  schemaOn: ['JSON schema', 'JSON 模式'],
  send: ['Send', '发送'],
  stop: ['Stop', '停止'],
  hello: ['What shall we talk about?', '想聊点什么？'],
  helloText: ['The model runs on this server. Nothing you write leaves it.', '模型运行在这台服务器上，你输入的内容不会离开它。'],
  try1: ['Explain what a KV cache is', '解释什么是 KV 缓存'],
  try2: ['Write a short poem about the sea', '写一首关于大海的短诗'],
  try3: ['Sort a list in Python, with an example', '用 Python 给列表排序，并举例'],
  you: ['You', '你'],
  assistant: ['Assistant', '助手'],
  thinking: ['Thinking', '正在思考'],
  thought: ['Thought for {s}', '思考了 {s}'],
  thoughtOpen: ['Thinking (stopped after {s})', '思考（{s} 后停止）'],
  code: ['code', '代码'],
  table: ['Table', '表格'],
  copyCode: ['Copy code', '复制代码'],
  copy: ['Copy', '复制'],
  copied: ['Copied', '已复制'],
  done: ['done', '已完成'],
  notDone: ['not done', '未完成'],
  regenerate: ['Answer again', '重新回答'],
  edit: ['Edit and send again', '编辑并重新发送'],
  editMessage: ['Edit the message', '编辑消息'],
  tokens: ['{n} tokens', '{n} 个词元'],
  rate: ['{n} tok/s', '{n} 词元/秒'],
  ttft: ['first token {n}', '首词元 {n}'],
  prompt: ['prompt {n}', '提示 {n}'],
  promptCached: ['prompt {n}, {c} from cache', '提示 {n}，其中缓存 {c}'],
  liveRate: ['about {n} tok/s', '约 {n} 词元/秒'],
  cutLength: ['Stopped at the token limit', '达到词元上限而停止'],
  stopped: ['Stopped by you', '已由你停止'],
  working: ['The assistant is answering', '助手正在回答'],
  answered: ['Answer complete', '回答完成'],
  retry: ['Try again', '重试'],
  errNetwork: ['The server cannot be reached.', '无法连接服务器。'],
  errCut: ['The connection ended before the answer was complete.', '回答完成前连接已断开。'],
  errBusy: ['The server is busy.', '服务器繁忙。'],
  errBusyIn: ['The server is busy. Try again in {s} s.', '服务器繁忙，请 {s} 秒后重试。'],
  errKey: ['The server wants an API key.', '服务器需要 API 密钥。'],
  errServer: ['The server answered with error {code}: {text}', '服务器返回错误 {code}：{text}'],
  errStream: ['The server reported an error: {text}', '服务器报告错误：{text}'],
  errFormat: ['The server sent something that is no chat stream.', '服务器返回的内容不是对话流。'],
  errStorage: ['The browser has no room left for conversations. Export and delete some.', '浏览器存储空间已满，请导出并删除部分对话。'],
  errNoStorage: ['This browser does not keep data for this page: conversations are lost on reload.', '浏览器不允许保存数据：刷新后对话会丢失。'],
  keyTitle: ['API key', 'API 密钥'],
  keyText: ['This server answers only with a key. Ask whoever runs it.', '该服务器需要密钥才能使用，请向管理员索取。'],
  keyLabel: ['Key', '密钥'],
  keyKeep: ['Keep it in this browser', '保存在本浏览器'],
  keyBad: ['The server did not accept this key.', '服务器未接受该密钥。'],
  use: ['Use key', '使用'],
  toolCall: ['Tool call', '工具调用'],
  toolArgs: ['Arguments', '参数'],
  toolResult: ['Result', '结果'],
  toolResultOf: ['Result of {name}', '{name} 的结果'],
  toolHint: ['Type what the tool returns', '输入工具的返回结果'],
  toolSend: ['Send result', '发送结果'],
  toolSendAll: ['Send results', '发送全部结果'],
  toolWaiting: ['waiting for its result', '等待结果'],
  toolAnswered: ['answered', '已返回'],
  setAnswer: ['Answering', '回答方式'],
  setSystem: ['System prompt', '系统提示词'],
  setSystemHint: ['How the assistant should behave', '希望助手如何表现'],
  setSampling: ['Sampling', '采样参数'],
  setDefault: ['default', '默认'],
  setEmpty: ['An empty field leaves the choice to the server.', '留空则由服务器决定。'],
  temperature: ['Temperature', '温度 temperature'],
  top_p: ['Top p', 'Top p'],
  top_k: ['Top k', 'Top k'],
  min_p: ['Min p', 'Min p'],
  presence_penalty: ['Presence penalty', '存在惩罚'],
  frequency_penalty: ['Frequency penalty', '频率惩罚'],
  repetition_penalty: ['Repetition penalty', '重复惩罚'],
  max_tokens: ['Max tokens', '最大词元数'],
  seed: ['Seed', '随机种子'],
  setThink: ['Let the model think before it answers', '回答前先思考'],
  setTools: ['Tools', '工具'],
  setToolsHint: ['A JSON list of functions, as in the OpenAI API', '函数的 JSON 列表，格式同 OpenAI 接口'],
  setToolChoice: ['Tool choice', '工具选择'],
  choiceAuto: ['the model decides', '由模型决定'],
  choiceNone: ['never call', '不调用'],
  choiceRequired: ['always call', '必须调用'],
  setSchema: ['JSON schema of the answer', '回答的 JSON 模式'],
  setSchemaHint: ['The answer will be JSON that fits', '回答将是符合该模式的 JSON'],
  example: ['Insert an example', '插入示例'],
  setPage: ['Page', '页面'],
  setTheme: ['Theme', '主题'],
  setLanguage: ['Language', '语言'],
  reset: ['Reset to defaults', '恢复默认'],
  badRange: ['between {a} and {b}', '应在 {a} 到 {b} 之间'],
  badJson: ['Not valid JSON: {text}', 'JSON 无效：{text}'],
  badTools: ['Must be a list of objects like {"type": "function", "function": {"name": "..."}}', '应为对象列表，形如 {"type": "function", "function": {"name": "..."}}'],
  badSchema: ['Must be a JSON object', '应为 JSON 对象'],
  fixSettings: ['Please correct the settings marked in the panel first.', '请先修正侧栏中标出的设置。'],
  kvIntro: ['The physical blocks of the KV cache. Each colour is one sequence.', 'KV 缓存的物理块，每种颜色代表一个序列。'],
  kvSummary: ['{n} blocks of {size} tokens', '{n} 块，每块 {size} 个词元'],
  kvBeyond: ['{n} free ones not drawn', '另有 {n} 个空闲块未画出'],
  kvUsed: ['one owner', '独占'],
  kvShared: ['shared', '共享'],
  kvCached: ['cached', '缓存'],
  kvFree: ['free', '空闲'],
  kvImage: ['Map of {n} blocks: {used} used, {shared} shared, {cached} cached, {free} free', '{n} 个块的分布图：使用 {used}，共享 {shared}，缓存 {cached}，空闲 {free}'],
  kvSequences: ['Sequences', '序列'],
  kvNone: ['No sequence is in the cache now. Send a message and watch.', '当前没有序列。发送一条消息试试。'],
  kvSequence: ['Request {r}', '请求 {r}'],
  kvChoice: ['choice {c}', '分支 {c}'],
  kvSize: ['{t} tokens in {b} blocks', '{t} 个词元，{b} 个块'],
  kvRunning: ['running', '运行中'],
  kvWaiting: ['waiting', '等待中'],
  kvTable: ['Block table of request {r}', '请求 {r} 的块表'],
  kvColLogical: ['Logical', '逻辑块'],
  kvColPhysical: ['Physical', '物理块'],
  kvColTokens: ['Tokens', '词元'],
  kvColShared: ['Shared by', '共享者'],
  kvMore: ['{n} more rows', '另有 {n} 行'],
  kvTipFree: ['Block {b}: free', '块 {b}：空闲'],
  kvTipCached: ['Block {b}: cached, may be reused', '块 {b}：缓存，可复用'],
  kvTipUsed: ['Block {b}: {who}, tokens {from} to {to}', '块 {b}：{who}，词元 {from} 到 {to}'],
  kvUnavailable: ['This server does not show its blocks.', '该服务器不提供块信息。'],
  srvUnavailable: ['This server shows no metrics.', '该服务器不提供指标。'],
  srvThroughput: ['Generated tokens per second', '每秒生成词元数'],
  srvChart: ['Generated tokens per second over the last {s} s, now {n}', '最近 {s} 秒每秒生成词元数，当前 {n}'],
  srvRunning: ['Running', '运行中'],
  srvQueue: ['In queue', '排队'],
  srvKv: ['KV cache in use', 'KV 缓存使用'],
  srvHits: ['Prompt from cache', '提示命中缓存'],
  srvTtft: ['Time to first token', '首词元时间'],
  srvFinished: ['Requests finished', '已完成请求'],
  srvPeak: ['peak {n}', '峰值 {n}'],
  keySend: ['Send', '发送'],
  keyNewline: ['New line', '换行'],
  keyStop: ['Stop, or close a panel', '停止，或关闭侧栏'],
  keyLast: ['Edit the last message (in an empty box)', '编辑上一条消息（输入框为空时）'],
  keyInput: ['Go to the message box', '跳到输入框'],
  keyRegenerate: ['Answer again', '重新回答'],
  keyHelp: ['This list', '本列表'],
};

const EXAMPLE_WORDS = {
  tool: ['Weather of a city', '查询城市天气'], city: ['Name of the city', '城市名'],
};

let index = 0;
export const languageName = ['English', '中文'];

export function setLanguage(choice) {
  const browser = (navigator.languages || [navigator.language]).find((l) => /^(en|zh)/i.test(l)) || 'en';
  index = (choice === 'auto' ? browser : choice).toLowerCase().startsWith('zh') ? 1 : 0;
  document.documentElement.lang = ['en', 'zh-CN'][index];
}

export const language = () => index;
export const exampleWord = (key) => EXAMPLE_WORDS[key][index];

export function t(key, values) {
  if (!TEXT[key]) throw new Error('no text ' + key);
  return TEXT[key][index].replace(/\{(\w+)\}/g, (whole, name) => (values && name in values ? values[name] : whole));
}

// Sets the texts of elements that index.html marks: data-t (text), data-label (accessible name and tooltip), data-ph.
export function translate(root, values = {}) {
  for (const node of root.querySelectorAll('[data-t]')) node.textContent = t(node.dataset.t, values);
  for (const node of root.querySelectorAll('[data-ph]')) node.placeholder = t(node.dataset.ph, values);
  for (const node of root.querySelectorAll('[data-label]')) {
    const text = t(node.dataset.label, values);
    node.setAttribute('aria-label', text);
    if (node.tagName === 'BUTTON') node.title = text;
  }
}

export function count(n) {
  return Math.round(n).toLocaleString(index ? 'zh-CN' : 'en-US');
}

export function duration(ms) {
  if (ms < 1000) return (ms < 10 ? ms.toFixed(1) : Math.round(ms)) + ' ms';
  return (ms / 1000).toFixed(ms < 10000 ? 1 : 0) + ' s';
}
