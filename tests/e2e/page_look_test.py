"""The chat page in headless Chromium: panels, languages, themes, keys, small screens, accessibility."""
import json
import re

import pytest
from page_actions import answer, ask, done, expect, texts
from page_samples import MARKDOWN, VALUES
from page_server import WEB, Reply, tool_call

PHONE = {"viewport": {"width": 320, "height": 568}, "is_mobile": True, "has_touch": True}
PANELS = ["settings", "blocks", "server"]

# Request 7: blocks 0 1 2 (shared) and 5; request 8, two choices: 0 1 2 and 9, 0 1 2 and 3; cached: 4 and 6; 11 blocks free.
BLOCKS = {"block_size": 16, "n_block": 20, "cached": [4, 6], "owners": [
    {"request": 7, "choice": 0, "n_tok": 52, "running": True, "blocks": [0, 1, 2, 5]},
    {"request": 8, "choice": 0, "n_tok": 64, "running": True, "blocks": [0, 1, 2, 9]},
    {"request": 8, "choice": 1, "n_tok": 49, "running": False, "blocks": [0, 1, 2, 3]}]}


def metrics(tokens):
    return (f"# HELP minimind_requests_running x\n# TYPE minimind_requests_running gauge\nminimind_requests_running 3\n"
            f"minimind_requests_waiting 2\nminimind_kv_blocks 200\nminimind_kv_blocks_used 50\nminimind_answered_prompt_tokens_total 1000\n"
            f"minimind_answered_cached_tokens_total 250\nminimind_generated_tokens_total {tokens}\nminimind_requests_finished_total 1234\n"
            f'minimind_time_to_first_token_seconds_bucket{{le="+Inf"}} 4\nminimind_time_to_first_token_seconds_sum 0.1\n'
            f"minimind_time_to_first_token_seconds_count 4\n")


def fill_with_everything(server, page):
    """A conversation with all kinds of content, and data behind all panels."""
    server.blocks, server.metrics = BLOCKS, metrics(0)
    server.replies = [Reply({"think": "Some **thought**."}, *re.findall(r"\S+\s*", MARKDOWN), *tool_call(0, "get_weather", '{"city": "Berlin"}'),
                            finish="tool_calls"), Reply("Half", end="cut")]
    ask(page, "Everything, please. " + "A long sentence that has to wrap on small screens, and averyveryverylongwordwithoutanyspaces" * 2)
    page.locator(".tool textarea").fill("21 C")
    page.locator(".calls .strong").click()
    done(page)
    expect(answer(page).locator(".problem")).to_be_visible()
    page.locator(".think summary").first.click()


# Panels --------------------------------------------------------------------------------------------------------------

def pixel(page, block):
    """Colour in the middle of a block of the map."""
    return page.evaluate("""(b) => {
      const c = document.querySelector('.map canvas'), w = parseFloat(c.style.width), columns = Number(c.dataset.columns), cell = w / columns;
      const k = c.width / w, x = (b % columns + 0.46) * cell * k, y = (Math.floor(b / columns) + 0.46) * cell * k;
      return [...c.getContext('2d').getImageData(x, y, 1, 1).data].slice(0, 3).join();
    }""", block)


def colours_in(page, block):
    return page.evaluate("""(b) => {
      const c = document.querySelector('.map canvas'), w = parseFloat(c.style.width), columns = Number(c.dataset.columns), cell = w / columns, k = c.width / w;
      const d = c.getContext('2d').getImageData((b % columns) * cell * k + 4, Math.floor(b / columns) * cell * k + 4, 12 * k, 12 * k).data;
      const seen = new Set();
      for (let i = 0; i < d.length; i += 4) seen.add(d.slice(i, i + 4).join());
      return seen.size;
    }""", block)


def test_blocks_by_sequence(server, open_page):
    server.blocks = BLOCKS
    page = open_page(allow=["willReadFrequently"])  # Chromium's advice to this test, which looks at pixels
    assert server.polls["/debug/blocks"] == 0  # asked only while it is looked at
    page.click("[data-panel=blocks]")
    expect(page.locator(".legend")).to_contain_text(re.compile(r"one owner\s*3\s*shared\s*3\s*cached\s*2\s*free\s*12"))
    assert page.locator(".map canvas").get_attribute("aria-label") == "Map of 20 blocks: 6 used, 3 shared, 2 cached, 12 free"
    rows = [re.sub(r"\s+", " ", t) for t in texts(page, ".sequences li")]
    assert rows == ["Request 7 52 tokens in 4 blocks running", "Request 8, choice 0 64 tokens in 4 blocks running",
                    "Request 8, choice 1 49 tokens in 4 blocks waiting"]
    swatch = page.locator(".sequences .swatch").evaluate_all(
        "l => l.map((x) => getComputedStyle(x).backgroundColor.match(/\\d+/g).join())")
    assert len(set(swatch)) == 3
    assert pixel(page, 9) == swatch[1]            # a full block has its owner's colour,
    assert colours_in(page, 0) >= 3               # a shared one stripes of all of them,
    assert colours_in(page, 5) == 2               # a partly filled one its level,
    assert colours_in(page, 4) == 2 and pixel(page, 10) == pixel(page, 19) != swatch[0]  # cached is hatched, free is plain
    page.get_by_role("button", name="Request 7").click()
    assert [t.split("\t") for t in texts(page, "#pane-blocks tbody tr")] == [
        *([str(i), str(i), "16 / 16", " Request 8, choice 0, Request 8, choice 1"] for i in range(3)), ["3", "5", "4 / 16", "–"]]
    box, columns = page.locator(".map canvas").bounding_box(), int(page.get_attribute(".map canvas", "data-columns"))
    cell = box["width"] / columns
    page.mouse.move(box["x"] + 5.4 * cell, box["y"] + 10)
    expect(page.locator(".tip")).to_have_text("Block 5: Request 7, tokens 48 to 51")
    page.mouse.click(box["x"] + 9.4 * cell, box["y"] + 10)
    expect(page.get_by_role("button", name="Request 8, choice 0")).to_have_attribute("aria-pressed", "true")
    server.blocks = {**BLOCKS, "owners": BLOCKS["owners"][:1]}  # live: it follows the server
    expect(page.locator(".sequences li")).to_have_count(1)
    expect(page.locator("#pane-blocks tbody tr")).to_have_count(0)
    server.blocks = {**BLOCKS, "owners": []}
    expect(page.locator(".sequences")).to_contain_text("No sequence is in the cache now")
    page.click("#panel-close")
    page.wait_for_timeout(600)
    polls = server.polls["/debug/blocks"]
    page.wait_for_timeout(900)
    assert server.polls["/debug/blocks"] == polls


@pytest.mark.parametrize("blocks", [{}, [], 5, {"n_block": -3, "block_size": 0, "owners": [{}], "cached": 7},
                                    {"n_block": 3, "owners": [{"blocks": [0, 0, 5, -1, "x", None]}, {"blocks": "abc"}]}])
def test_odd_block_maps_do_no_harm(server, open_page, blocks):
    server.blocks = blocks
    page = open_page()
    page.click("[data-panel=blocks]")
    page.wait_for_timeout(700)
    assert server.polls["/debug/blocks"] > 0 and page.locator(".legend li").count() == 4


def test_a_large_pool_is_drawn_in_time(server, open_page):
    n = 120_000
    server.blocks = json.dumps({"block_size": 16, "n_block": n, "cached": list(range(60000, 90000)), "owners": [
        {"request": i, "choice": 0, "n_tok": 16 * 300, "running": True, "blocks": [*range(40), *range(40 + i * 260, 300 + i * 260)]}
        for i in range(200)]})
    page = open_page()
    page.click("[data-panel=blocks]")
    expect(page.locator(".sequences li")).to_have_count(200)
    ms = page.evaluate("""async () => {
      const {BlocksPane, readMap} = await import('/blocks.js');
      const data = await (await fetch('/debug/blocks')).json();
      const pane = new BlocksPane();
      pane.build();
      const start = performance.now();
      pane.map = readMap(data);
      pane.draw();
      return performance.now() - start;
    }""")
    assert ms < 1500, f"{ms:.0f} ms"


def test_server_panel(server, open_page):
    state = {"tokens": 0}

    def counting():
        state["tokens"] += 500
        return metrics(state["tokens"])

    server.metrics = counting
    page = open_page()
    page.click("[data-panel=server]")
    expect(page.locator(".tile")).to_have_text(["Running3", "In queue2", "KV cache in use25 %", "Prompt from cache25 %",
                                                "Time to first token25 ms", "Requests finished1,234"])
    expect(page.locator(".big")).to_have_text(re.compile(r"^[1-9][\d,]* tok/s$"))
    assert 100 <= int(re.sub(r"\D", "", page.locator(".big").inner_text())) <= 900  # 500 a second if nothing is late
    page.wait_for_timeout(1200)
    assert len(page.locator(".line").get_attribute("points").split()) >= 2
    server.metrics = None
    expect(page.locator("#pane-server [role=status]")).to_have_text("This server shows no metrics.")
    page.click("[data-panel=server]")
    expect(page.locator("#panel")).to_be_hidden()


# Languages, themes, keys ---------------------------------------------------------------------------------------------

def test_chinese(server, open_page):
    page = open_page(locale="zh-CN")
    assert page.get_attribute("html", "lang") == "zh-CN"
    expect(page.locator(".welcome h2")).to_have_text("想聊点什么？")
    fill_with_everything(server, page)
    english = set()
    for panel in PANELS:
        page.click(f"[data-panel={panel}]")
        page.wait_for_timeout(200)
        labels = page.locator("button, label > span, h3, th, dt, summary, .stats").evaluate_all(
            "l => l.filter((e) => e.offsetParent && !e.closest('.md, #chats')).map((e) => (e.textContent || '') + ' ' + (e.getAttribute('aria-label') || ''))")
        english |= {w for text in labels for w in re.findall(r"[A-Za-z]{3,}", text)}
    allowed = {"Top", "Min", "temperature", "JSON", "English", "minimind", "get", "weather"}
    assert english <= allowed, english - allowed
    page.click("#lang")
    assert page.get_attribute("html", "lang") == "en" and texts(page, "#new") == ["New chat"]
    page.reload()
    assert texts(page, "#new") == ["New chat"]
    page.click("[data-panel=settings]")
    page.select_option("#set-lang", "auto")
    assert texts(page, "#new") == ["新对话"]


def test_every_text_has_both_languages_with_the_same_values():
    rows = re.findall(r"^  (\w+): \['((?:[^'\\]|\\.)*)', '((?:[^'\\]|\\.)*)'\],$", (WEB / "i18n.js").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(rows) > 120
    for key, english, chinese in rows:
        assert sorted(re.findall(r"\{\w+\}", english)) == sorted(re.findall(r"\{\w+\}", chinese)), key
        assert english and chinese
    used = "".join(p.read_text(encoding="utf-8") for p in WEB.glob("*") if p.name != "i18n.js")
    unused = [k for k, _, _ in rows if not re.search(rf"['\"]{k}['\"]", used) and k not in VALUES]
    assert not unused


def background(page):
    page.wait_for_timeout(100)
    return page.evaluate("getComputedStyle(document.body).backgroundColor")


def test_themes(server, open_page):
    page = open_page(color_scheme="dark")
    dark = background(page)
    page.emulate_media(color_scheme="light")
    light = background(page)
    assert light == "rgb(255, 255, 255)" and dark != light
    page.click("#theme")  # light
    page.emulate_media(color_scheme="dark")
    assert background(page) == light and page.get_by_role("button", name="Theme: light").is_visible()
    page.click("#theme")  # dark
    assert background(page) == dark
    page.emulate_media(color_scheme="light")
    page.reload()
    page.locator("html[data-theme=dark]").wait_for()
    assert background(page) == dark


def test_keys(server, open_page):
    page = open_page()
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    assert page.input_value("#input") == "one\ntwo"
    page.keyboard.press("Enter")
    done(page)
    assert server.requests[0]["messages"][0]["content"] == "one\ntwo"
    page.keyboard.press("ArrowUp")
    expect(page.locator(".editor textarea")).to_be_focused()
    page.keyboard.press("Escape")
    expect(page.locator("#input")).to_be_focused()
    page.keyboard.press("Alt+r")
    done(page)
    assert len(server.requests) == 2
    for key, name in [("s", "settings"), ("b", "blocks"), ("m", "server")]:
        page.keyboard.press(f"Alt+{key}")
        expect(page.locator(f"#tab-{name}")).to_be_focused()
    page.keyboard.press("ArrowRight")
    expect(page.locator("#tab-settings")).to_be_focused()
    assert page.locator("#pane-settings").is_visible() and page.locator("#pane-server").is_hidden()
    page.keyboard.press("Escape")
    expect(page.locator("#panel")).to_be_hidden()
    page.keyboard.press("Alt+/")
    expect(page.locator("#keys")).to_be_visible()
    assert "Alt + B" in page.locator("#keys").inner_text()
    page.keyboard.press("Escape")
    page.keyboard.press("Alt+l")
    expect(page.locator("#side")).to_be_hidden()
    page.keyboard.press("Alt+n")
    assert page.locator(".msg").count() == 0
    page.locator("#log").focus()
    page.keyboard.press("Alt+i")
    expect(page.locator("#input")).to_be_focused()


def test_an_input_method_may_use_enter(server, open_page):
    page = open_page(locale="zh-CN")
    page.fill("#input", "ni hao")
    for detail in ("isComposing: true", "keyCode: 229"):
        page.evaluate(f"document.getElementById('input').dispatchEvent(new KeyboardEvent('keydown', {{key: 'Enter', bubbles: true, cancelable: true, {detail}}}))")
    page.wait_for_timeout(200)
    assert server.requests == [] and page.input_value("#input") == "ni hao"


# Small screens and accessibility -------------------------------------------------------------------------------------

WIDER = """() => {
  const wide = document.documentElement.scrollWidth > innerWidth ? ['page ' + document.documentElement.scrollWidth] : [];
  const scrolls = (e) => { for (let p = e.parentElement; p; p = p.parentElement) if (/auto|scroll|hidden/.test(getComputedStyle(p).overflowX)) return true; };
  for (const e of document.querySelectorAll('body *')) {
    const box = e.getBoundingClientRect();
    if (box.width && box.right > innerWidth + 1 && e.checkVisibility() && !scrolls(e)) wide.push(e.tagName + '.' + e.className + ' ' + box.right);
  }
  for (const id of ['log', 'panel', 'pane-settings', 'pane-blocks', 'pane-server', 'side', 'chats']) {
    const e = document.getElementById(id);
    if (e.offsetParent && e.scrollWidth > e.clientWidth + 1) wide.push(id + ' scrolls ' + e.scrollWidth + ' in ' + e.clientWidth);
  }
  return wide;
}"""

SMALL = """() => [...document.querySelectorAll('button, select, input, textarea, summary')].filter((e) => {
  const box = e.getBoundingClientRect();
  const label = e.closest('label');
  return e.checkVisibility() && box.width && !e.disabled && Math.max(box.height, label ? label.getBoundingClientRect().height : 0) < 43.5;
}).map((e) => (e.id || e.className || e.tagName) + ' ' + e.getBoundingClientRect().height)"""


@pytest.mark.parametrize("locale", ["en-US", "zh-CN"])
def test_a_screen_of_320_pixels(server, open_page, locale):
    page = open_page(**PHONE, locale=locale)
    assert page.evaluate(WIDER) == [] and page.evaluate(SMALL) == []
    fill_with_everything(server, page)
    assert page.evaluate(WIDER) == [] and page.evaluate(SMALL) == []
    page.locator(".user button").nth(1).click()
    assert page.evaluate(WIDER) == [] and page.evaluate(SMALL) == []
    page.locator(".editor .plain").click()
    for panel in PANELS:
        page.click(f"[data-panel={panel}]")
        page.wait_for_timeout(500)
        if panel == "blocks":
            page.locator(".sequences button").first.click()
        assert page.evaluate(WIDER) == [] and page.evaluate(SMALL) == [], panel
        page.click("#panel-close")
    page.click("#side-open")
    assert page.evaluate(WIDER) == [] and page.evaluate(SMALL) == []
    page.locator("#chats .open").click()  # closes the drawer
    expect(page.locator("#side")).to_be_hidden()
    page.click("#side-open")
    page.locator("#shade").click(position={"x": 310, "y": 300})
    expect(page.locator("#side")).to_be_hidden()


CONTRAST = """() => {
  const parse = (c) => { const m = c.match(/[\\d.]+/g).map(Number); return {rgb: m.slice(0, 3), a: m.length > 3 ? m[3] : 1}; };
  const over = (top, under) => ({rgb: top.rgb.map((v, i) => v * top.a + under.rgb[i] * (1 - top.a)), a: 1});
  const ground = (e) => {
    const stack = [];
    for (let p = e; p; p = p.parentElement) { stack.push(parse(getComputedStyle(p).backgroundColor)); if (stack[stack.length - 1].a === 1) break; }
    return stack.reverse().reduce((under, top) => over(top, under), {rgb: parse(getComputedStyle(document.body).backgroundColor).rgb, a: 1});
  };
  const light = (c) => { const [r, g, b] = c.rgb.map((v) => { v /= 255; return v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const ratio = (a, b) => { const [x, y] = [light(a), light(b)].sort((p, q) => q - p); return (x + 0.05) / (y + 0.05); };
  const bad = [];
  let checked = 0;
  for (const e of document.querySelectorAll('body *')) {
    if (!e.checkVisibility({opacityProperty: true, visibilityProperty: true}) || e.closest('[disabled], canvas, .vh, .skip')) continue;
    const style = getComputedStyle(e), text = [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
    const picture = e.tagName === 'svg' && !e.classList.contains('chart');
    if (text || picture) {
      checked++;
      const r = ratio(over(parse(style.color), ground(e)), ground(e));
      if (r < (picture ? 3 : 4.5)) bad.push(`${e.tagName}.${e.className.baseVal ?? e.className} "${e.textContent.slice(0, 30)}" ${r.toFixed(2)}`);
    }
    if (e.placeholder && ratio(parse(getComputedStyle(e, '::placeholder').color), ground(e)) < 4.5) bad.push('placeholder of ' + e.id);
    if (/^(INPUT|TEXTAREA|SELECT)$/.test(e.tagName) && e.type !== 'checkbox' && parseFloat(style.borderTopWidth) &&
        parse(style.borderTopColor).a === 1 && ratio(parse(style.borderTopColor), ground(e.parentElement)) < 3) bad.push('edge of ' + (e.id || e.className));
  }
  return [checked, bad];
}"""

NAMES = """() => {
  const bad = [];
  for (const e of document.querySelectorAll('button, a, input, select, textarea, [role=img], [role=tabpanel], [role=group], nav, aside, dialog, article, section.tool')) {
    const by = (attribute) => (e.getAttribute(attribute) || '').split(' ').map((id) => id && document.getElementById(id)?.textContent).join('');
    const own = /^(INPUT|SELECT|TEXTAREA|NAV|ASIDE|DIALOG|ARTICLE|SECTION)$/.test(e.tagName) || /img|group|tabpanel/.test(e.getAttribute('role')) ? '' : e.textContent;
    const label = [...(e.labels || [])].map((l) => l.textContent).join('');
    if (!(e.getAttribute('aria-label') || by('aria-labelledby') || label || own || '').trim()) bad.push(e.outerHTML.slice(0, 120));
  }
  const ids = [...document.querySelectorAll('[id]')].map((e) => e.id);
  bad.push(...ids.filter((id, i) => ids.indexOf(id) !== i).map((id) => 'twice: ' + id));
  for (const e of document.querySelectorAll('[aria-controls], [aria-describedby], label[for]')) {
    for (const id of (e.getAttribute('aria-controls') || e.getAttribute('aria-describedby') || e.getAttribute('for')).split(' ')) {
      if (!document.getElementById(id)) bad.push('no element ' + id);
    }
  }
  for (const e of document.querySelectorAll('svg, img:not([alt])')) if (!e.closest('[aria-hidden]') && e.getAttribute('role') !== 'img') bad.push('unlabelled ' + e.outerHTML.slice(0, 60));
  for (const e of document.querySelectorAll('[tabindex]')) if (e.tabIndex > 0) bad.push('tabindex ' + e.outerHTML.slice(0, 60));
  return bad;
}"""


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_contrast_and_names(server, open_page, theme):
    page = open_page(color_scheme=theme, viewport={"width": 1400, "height": 900})

    def check(where):
        checked, bad = page.evaluate(CONTRAST)
        assert checked > 15 and not bad, (where, bad)
        assert page.evaluate(NAMES) == [], where

    check("welcome")
    fill_with_everything(server, page)
    page.locator(".user").first.hover()
    check("chat")
    for panel in PANELS:
        page.click(f"[data-panel={panel}]")
        page.wait_for_timeout(500)
        if panel == "settings":
            page.fill("#set-temperature", "9")
            page.fill("#set-schema", "{")
        if panel == "blocks":
            page.locator(".sequences button").first.click()
        check(panel)
    page.fill("#set-temperature", "") if page.locator("#set-temperature").is_visible() else None
    page.click("#keys-open")
    check("keys")
    page.click("#keys-close")
    page.locator(".user button").nth(1).click()
    page.locator("#chats li").hover()
    page.locator("#chats .icon").first.click()
    check("editing")


def test_order_of_focus(server, open_page):
    page = open_page()
    ask(page, "hi")
    to_start = "document.body.tabIndex = -1; document.body.focus(); document.body.removeAttribute('tabindex')"
    page.evaluate(to_start)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "input"
    page.evaluate(to_start)
    seen = []
    for _ in range(40):
        page.keyboard.press("Tab")
        seen.append(page.evaluate("""(() => { const e = document.activeElement, s = getComputedStyle(e);
          return [e.id || e.className, e.tagName === 'BODY' || s.outlineStyle !== 'none' || !!e.closest('#composer')]; })()"""))
        if seen[-1][0] == "think":
            break
    order = [name for name, _ in seen]
    assert order.index("new") < order.index("open") < order.index("lang") < order.index("side-open") < order.index("input") < order.index("think")
    assert all(visible for _, visible in seen), seen


def test_landmarks_and_headings(server, open_page):
    page = open_page()
    fill_with_everything(server, page)
    assert page.locator("main").count() == page.locator("nav").count() == page.locator("h1").count() == 1
    levels = [int(t[1]) for t in page.locator("#messages :is(h2, h3, h4, h5, h6)").evaluate_all("l => l.map((e) => e.tagName)")]
    assert levels and min(levels) >= 3  # below the title of the page
    assert page.locator("#live").get_attribute("aria-live") == "polite"


def test_reduced_motion(server, open_page):
    server.replies = [Reply({"think": "hm"}, end="hang")]
    page = open_page(reduced_motion="reduce")
    ask(page, "x", wait=False)
    expect(page.locator(".think summary")).to_be_visible()
    assert page.evaluate("document.getAnimations().length") == 0
    page.emulate_media(reduced_motion="no-preference")
    assert page.evaluate("document.getAnimations().length") > 0  # the check can fail
    page.click("#stop")


def test_the_page_works_at_twice_the_text_size(server, open_page):
    page = open_page(viewport={"width": 640, "height": 400})  # 1280 x 800 at 200 %
    fill_with_everything(server, page)
    assert page.evaluate(WIDER) == []
    assert page.locator("#input").bounding_box()["y"] < 400
