#!/usr/bin/env python3
"""Makes the pictures of the chat page: docs/img/page_*.png.

    .venv/bin/python docs/img/make_page_png.py

The page is the real one in headless Chromium; the texts and numbers come from the tests' stand-in for the server
(tests/e2e/page_server.py), because a small model's words would change with every run. With the Debian packages fonts-inter
and fonts-noto-cjk the fonts are those of the committed pictures.
"""
import base64
import math
import os
import pathlib
import random
import re
import sys
import tempfile

from playwright.sync_api import sync_playwright

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent / "tests" / "e2e"))
from conftest import chromium_path  # noqa: E402
from page_server import PageServer, Reply, tool_call  # noqa: E402

FONTS = """<?xml version="1.0"?><!DOCTYPE fontconfig SYSTEM "fonts.dtd"><fontconfig>
<include ignore_missing="yes">/etc/fonts/fonts.conf</include>
<match target="pattern"><test name="family"><string>system-ui</string></test>
<edit name="family" mode="prepend" binding="strong"><string>Inter</string><string>Noto Sans CJK SC</string></edit></match>
<match target="pattern"><test name="family"><string>sans-serif</string></test>
<edit name="family" mode="prepend" binding="strong"><string>Inter</string><string>Noto Sans CJK SC</string></edit></match></fontconfig>"""

QUESTION = "Why does a KV cache make decoding fast?"
THOUGHT = "The question is about decoding. I should compare the work with and without the cache, then say what it costs. " * 18
ANSWER = """Without a cache every new token would read the **whole text again**. The cache keeps the keys and values of each token, so a step only adds one row per layer.

| Step | Without cache | With cache |
|:--|--:|--:|
| work per token | grows with *n* | one row |
| memory | none | 16 tokens a block |

```python
def attend(q, cache, scale=0.125):
    scores = q @ cache.k.T * scale     # [heads, n]
    return softmax(scores) @ cache.v
```

1. The prompt is read once; that is the *prefill*.
2. Requests that begin alike **share** their first blocks."""

FRAGE = "柏林现在天气怎么样？"
ANTWORT = """柏林现在 **21 °C**，晴，微风。

- 适合散步，不需要外套
- 傍晚可能降到 14 °C"""
PHONE = """**KV 缓存**保存已读词元的键和值，新词元只需要*自己的*查询。

1. 提示只读一次（预填充）
2. 每步只添加一行

```cpp
for (int t = 0; t < n; t++)
  s[t] = dot(q, k[block[t / 16]]);
```"""


def tokens(text):
    return [part for word in re.findall(r"\s*\S+|\s+$", text) for part in re.findall(r"[^\u4e00-\u9fff]{1,7}|[\u4e00-\u9fff]{1,2}", word)]


def paced(parts):
    return [x for part in parts for x in (part, 0.001)]


def pool(n=384, seed=5):
    """Seven requests, four of them with the same beginning, one in two branches."""
    draw = random.Random(seed)
    order = sorted(range(n), key=lambda b: b // 24 + draw.random() * 5)
    take = lambda count: [order.pop(0) for _ in range(count)]  # noqa: E731
    shared, owners = take(6), []
    for i in range(6):
        own = (shared if i < 4 else []) + take(draw.randrange(6, 24))
        owners.append({"request": 41 + i, "choice": 0, "n_tok": 16 * len(own) - draw.randrange(2, 14), "running": i != 4, "blocks": own})
    twin = owners[5]["blocks"][:7] + take(5)
    owners.append({"request": 46, "choice": 1, "n_tok": 16 * len(twin) - 5, "running": True, "blocks": twin})
    return {"block_size": 16, "n_block": n, "owners": owners, "cached": [order.pop(draw.randrange(70)) for _ in range(38)]}


class Load:
    """/metrics of a server with some traffic."""

    def __init__(self):
        self.draw, self.tokens, self.calls = random.Random(7), 0, 0

    def __call__(self):
        self.calls += 1
        self.tokens += int(90 + 30 * math.sin(self.calls / 6) + 18 * math.sin(self.calls / 2.3) + self.draw.uniform(-9, 9))
        return "".join(f"minimind_{name} {value}\n" for name, value in {
            "requests_running": 6, "requests_waiting": 2, "kv_blocks": 384, "kv_blocks_used": 104, "answered_prompt_tokens_total": 48210,
            "answered_cached_tokens_total": 30110, "generated_tokens_total": self.tokens, "requests_finished_total": 1320,
            "time_to_first_token_seconds_sum": 2.61, "time_to_first_token_seconds_count": 320}.items())


def ask(page, text):
    page.fill("#input", text)
    page.press("#input", "Enter")
    page.locator("#stop").wait_for(state="hidden")
    page.wait_for_timeout(150)


def main():
    server = PageServer()
    server.blocks, server.metrics = pool(), Load()
    fonts = pathlib.Path(tempfile.mkdtemp()) / "fonts.conf"
    fonts.write_text(FONTS)

    def shoot(page, name, **options):
        page.mouse.move(0, 0)
        page.screenshot(path=HERE / f"page_{name}.png", **options)
        print(f"page_{name}.png", (HERE / f"page_{name}.png").stat().st_size)

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium_path(), env={**os.environ, "FONTCONFIG_FILE": str(fonts)})

        def open_page(**options):
            page = browser.new_page(**{"viewport": {"width": 1360, "height": 850}, "locale": "en-US", **options})
            page.goto(server.url)
            page.locator("html[data-theme]").wait_for()
            return page

        page = open_page()
        for title in ("Plan a weekend in the mountains", "Fix a race in my thread pool"):
            ask(page, title)
            page.click("#new")
        server.replies = [Reply(*paced([{"think": x} for x in tokens(THOUGHT)] + tokens(ANSWER)), usage=(412, 384))]
        ask(page, QUESTION)
        page.click("[data-panel=blocks]")
        page.wait_for_timeout(600)
        page.evaluate("document.getElementById('log').scrollTop = 0; document.activeElement.blur()")
        page.wait_for_timeout(200)
        shoot(page, "light")
        page.locator(".sequences button").nth(1).click()
        page.evaluate("document.activeElement.blur()")
        page.set_viewport_size({"width": 1360, "height": 1230})
        page.wait_for_timeout(600)
        box = page.locator("#panel").bounding_box()
        shoot(page, "blocks", clip=box)

        page = open_page(locale="zh-CN", color_scheme="dark")
        for title in ("用 C++ 写一个线程池", "解释注意力机制"):
            ask(page, title)
            page.click("#new")
        thought = [{"think": x} for x in tokens("需要查询天气，先调用工具。" * 40)]
        server.replies = [Reply(*paced([*thought, *tool_call(0, "get_weather", '{"city": "柏林", "unit": "celsius"}')]), usage=(172, 160)),
                          Reply(*paced(tokens(ANTWORT)), usage=(318, 288))]
        page.click("[data-panel=settings]")
        page.get_by_role("button", name="插入示例").first.click()
        ask(page, FRAGE)
        page.locator(".tool textarea").fill('{"temperature": 21, "sky": "晴"}')
        page.locator(".calls .strong").click()
        page.locator("#stop").wait_for(state="hidden")
        page.click("#tab-server")
        page.evaluate("""async () => {  // a minute of samples in a moment
          const {ServerPane, readMetrics} = await import('/server.js');
          ServerPane.prototype.poll = async function () {
            if (!this.open) return;
            for (let i = 0; i < 60; i++) this.take(readMetrics(await (await fetch('/metrics')).text()), (this.clock = (this.clock || 0) + 100));
          };
        }""")
        page.click("#tab-settings")
        page.click("#tab-server")
        page.wait_for_timeout(1500)
        page.evaluate("document.activeElement.blur()")
        shoot(page, "dark_zh")

        phone = {"viewport": {"width": 360, "height": 740}, "is_mobile": True, "has_touch": True, "device_scale_factor": 1.25}
        shots = []

        def keep(page):
            shots.append(base64.b64encode(page.screenshot()).decode())

        page = open_page(**phone, locale="zh-CN")
        keep(page)
        server.replies = [Reply(*paced([{"think": x} for x in tokens("用户问的是 KV 缓存。" * 50)] + tokens(PHONE)), usage=(24, 16))]
        ask(page, "什么是 KV 缓存？")
        keep(page)
        page = open_page(**phone, color_scheme="dark")
        page.click("[data-panel=blocks]")
        page.wait_for_timeout(600)
        keep(page)
        sheet = browser.new_page(viewport={"width": 3 * 360 + 4 * 24, "height": 740 + 48}, device_scale_factor=1.25)
        sheet.set_content("<body style='margin:24px;display:flex;gap:24px;background:#e9e7e1'>" + "".join(
            f"<img width=360 height=740 style='border-radius:28px' src='data:image/png;base64,{shot}'>" for shot in shots))
        shoot(sheet, "phone")
        browser.close()
    server.close()


if __name__ == "__main__":
    main()
