"""The chat page in headless Chromium: conversations, streams and their failures, markdown, tools, settings."""
import json
import re
import time

import pytest
from page_server import WEB, PageServer, Reply, tool_call

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (tests/requirements.txt)")
expect = playwright.expect
expect.set_options(timeout=20000)  # the machine may be busy


def ask(page, text, wait=True):
    page.fill("#input", text)
    page.press("#input", "Enter")
    if wait:
        done(page)


def done(page):
    expect(page.locator("#stop")).to_be_hidden()
    expect(page.locator("#send")).to_be_visible()


def answer(page):
    return page.locator(".assistant").last


def texts(page, selector):
    return [t.strip() for t in page.locator(selector).all_inner_texts()]


def roles(request):
    return [m["role"] for m in request["messages"]]


# Streaming -----------------------------------------------------------------------------------------------------------

def test_an_answer_streams(server, open_page):
    server.replies = [Reply("One ", "two ", 0.6, "three.", usage=(34, 16))]
    page = open_page()
    assert page.locator("#send").is_disabled()
    ask(page, "Count\nto three", wait=False)
    expect(answer(page).locator(".md").last).to_have_text("One two")
    expect(page.locator("#stop")).to_be_visible()
    expect(answer(page).locator(".stats")).to_contain_text(re.compile(r"about [\d,]+ tok/s.*first token [\d.]+ ms"))
    done(page)
    expect(answer(page).locator(".md").last).to_have_text("One two three.")
    stats = answer(page).locator(".stats").inner_text().replace("\n", "")
    seen = re.fullmatch(r"3 tokens·?(\d+) tok/s·?first token ([\d.]+) ms·?prompt 34, 16 from cache", stats.replace(" · ", "·"))
    assert seen and 1 <= int(seen[1]) <= 4, stats  # 2 tokens in 0.6 s
    body = server.requests[0]
    assert body["messages"] == [{"role": "user", "content": "Count\nto three"}]
    assert body["model"] == "minimind-3" and body["stream"] is True and body["stream_options"] == {"include_usage": True}
    assert set(body) == {"model", "messages", "stream", "stream_options"}  # what is left empty is not sent
    expect(page.locator("#live")).to_have_text("Answer complete: One two three.")
    assert page.input_value("#input") == "" and page.evaluate("document.activeElement.id") == "input"


def test_bytes_may_be_cut_anywhere(server, open_page):
    text = "你好，世界 👩‍👩‍👧‍👦 — naïve 𝔘𝔫𝔦"
    server.replies = [Reply(*text, chop=5)]
    page = open_page()
    ask(page, "cut")
    expect(answer(page).locator(".md").last).to_have_text(text)


def test_odd_but_valid_events(server, open_page):
    chunk = json.dumps({"choices": [{"index": 0, "delta": {"content": "fine"}}]})
    odd = ": comment\r\n\r\nevent: message\r\nid: 7\r\ndata:" + chunk.replace(', "', ',\r\ndata: "', 1) + "\r\n\r\n"
    unknown = 'data: {"choices": [], "usage": null}\n\ndata: {"choices": [{"delta": null}]}\n\ndata: {"object": "x"}\n\n'
    server.replies = [Reply(odd.encode(), unknown.encode())]
    page = open_page()
    ask(page, "odd")
    expect(answer(page).locator(".md").last).to_have_text("fine")


def test_a_fast_long_answer(server, open_page):
    """Thousands of chunks without a pause: all arrive, the page stays responsive and follows the end."""
    server.replies = [Reply(*[f"word{i} " + ("\n\n" if i % 40 == 39 else "") for i in range(6000)])]
    page = open_page()
    start = time.monotonic()
    ask(page, "long", wait=False)
    page.locator("#stop").wait_for(state="hidden", timeout=60000)
    assert time.monotonic() - start < 40  # 3 s on a machine with nothing else to do
    assert answer(page).locator(".md p").count() == 150
    gap = page.evaluate("(() => { const l = document.getElementById('log'); return l.scrollHeight - l.scrollTop - l.clientHeight; })()")
    assert gap < 80


def test_reading_above_the_end_is_left_alone(server, open_page):
    server.replies = [Reply(*["line\n\n"] * 60, 0.8, *["more\n\n"] * 20)]
    page = open_page()
    ask(page, "scroll", wait=False)
    expect(answer(page).locator(".md p")).to_have_count(60)
    page.mouse.move(600, 300)
    page.mouse.wheel(0, -600)
    expect(page.locator("#jump")).to_be_visible()
    top = page.evaluate("document.getElementById('log').scrollTop")
    done(page)
    assert page.evaluate("document.getElementById('log').scrollTop") == top
    page.click("#jump")
    expect(page.locator("#jump")).to_be_hidden()


@pytest.mark.parametrize("how", ["button", "escape"])
def test_stop(server, open_page, how):
    server.replies = [Reply("Once upon a time", end="hang")]
    page = open_page()
    ask(page, "story", wait=False)
    expect(answer(page).locator(".md").last).to_have_text("Once upon a time")
    page.click("#stop") if how == "button" else page.keyboard.press("Escape")
    done(page)
    expect(answer(page).locator(".stats")).to_contain_text("Stopped by you")
    assert answer(page).locator(".problem").is_hidden()
    for _ in range(50):
        if server.left:
            break
        time.sleep(0.1)
    assert server.left == 1  # the connection was closed, so the server can stop working


def test_the_token_limit_is_said(server, open_page):
    server.replies = [Reply("cut off", finish="length")]
    page = open_page()
    ask(page, "x")
    expect(answer(page).locator(".stats")).to_contain_text("Stopped at the token limit")


# Failures ------------------------------------------------------------------------------------------------------------

FAILURES = {
    "busy": (Reply(status=429, headers={"Retry-After": "7"}, body={"error": {"message": "queue full"}}),
             "The server is busy. Try again in 7 s."),
    "bad request": (Reply(status=400, body={"error": {"message": "temperature: expected at most 2", "type": "invalid_request_error"}}),
                    "The server answered with error 400: temperature: expected at most 2"),
    "html": (Reply(status=502, headers={"Content-Type": "text/html"}, body="<html><script>pwned=1</script>Bad gateway</html>"),
             "The server answered with error 502: Bad Gateway"),
    "many lines": (Reply(status=500, body={"error": {"message": "first\nsecond\n\n third" + "x" * 5000}}),
                   re.compile(r"^The server answered with error 500: first second thirdx{270,300}$")),
    "cut": (Reply("Half an ", end="cut"), "The connection ended before the answer was complete."),
    "event": (Reply("Half an ", end="error"), "The server reported an error: the engine stopped"),
    "no stream": (Reply(status=200, body={"choices": []}), "The server sent something that is no chat stream."),
    "no json": (Reply(b"data: {oops\n\n"), "The server sent something that is no chat stream."),
    "nothing": (Reply(b"data: [DONE]\n\n", end="cut"), "The server sent something that is no chat stream."),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_failure_is_one_line_and_can_be_retried(server, open_page, name):
    reply, line = FAILURES[name]
    server.replies = [reply, Reply("Better now.")]
    page = open_page()
    ask(page, "try")
    problem = answer(page).locator(".problem")
    expect(problem.locator("span")).to_have_text(line)
    assert problem.get_attribute("role") == "alert"
    if name in ("cut", "event"):  # what came is kept
        expect(answer(page).locator(".md").last).to_have_text("Half an")
    problem.get_by_role("button", name="Try again").click()
    done(page)
    expect(answer(page).locator(".md").last).to_have_text("Better now.")
    assert page.locator(".problem:visible").count() == 0 and page.locator(".msg").count() == 2
    assert server.requests[0] == server.requests[1]
    assert page.evaluate("window.pwned") is None


def test_a_server_that_is_gone(open_page):
    mine = PageServer()
    page = open_page(mine.url)
    mine.close()
    ask(page, "hello?")
    expect(answer(page).locator(".problem span")).to_have_text("The server cannot be reached.")


def test_api_key(server, open_page):
    server.key = "sesame"
    page = open_page()
    dialog = page.locator("#auth")
    expect(dialog).to_be_visible()
    page.fill("#auth-key", "wrong")
    page.click("#auth-ok")
    expect(page.locator("#auth-bad")).to_be_visible()
    page.click("#auth-cancel")
    ask(page, "hi")
    expect(dialog).to_be_visible()  # asked again, since the answer was refused
    page.fill("#auth-key", "sesame")
    page.press("#auth-key", "Enter")
    expect(answer(page).locator(".md").last).to_have_text("Hello. How are you?")
    done(page)
    assert page.locator(".msg").count() == 2
    kept = page.evaluate("[JSON.stringify(localStorage), JSON.stringify(sessionStorage)]")
    assert "sesame" not in kept[0] and "sesame" in kept[1]  # for this tab only, unless asked to keep it
    page.reload()
    expect(page.locator("#model-box")).to_have_text("minimind-3")
    assert dialog.is_hidden()


# Markdown ------------------------------------------------------------------------------------------------------------

MARKDOWN = """# Title

A *soft* and **loud** and ***both*** and ~~gone~~ word, `x < 1`, snake_case_name, 2 * 3 * 4, \\*plain\\*.
Second line with https://example.com/a_(b). And <https://example.org/x>.

3. third
4. fourth
   - inner **bold**
     - [x] done
     - [ ] open

| a | b |
|:-:|--:|
| 1 | `x|y` |
| **2** | \\| |

> quoted *text*
> - item

```cpp
int main() { return 42; }  // "comment"
const char* s = "a // b";
```

---
[name](https://example.com/?q=1 "t") ![alt](https://example.com/i.png) [bad](javascript:alert(1)) [rel](/etc)
中文**“加粗”**文字。

~~~
plain
"""


def test_markdown(server, open_page):
    server.replies = [Reply(*re.findall(r"[^ ]* ?", MARKDOWN))]
    page = open_page()
    ask(page, "md")
    md = answer(page).locator(".md").last
    expect(md.locator("h3.h1")).to_have_text("Title")
    first = md.locator("p").first
    assert first.locator("em").all_inner_texts() == ["soft", "both"] and first.locator("strong").all_inner_texts() == ["loud", "both"]
    assert first.locator("del").inner_text() == "gone" and first.locator("code").inner_text() == "x < 1"
    assert "snake_case_name, 2 * 3 * 4, *plain*." in first.inner_text() and first.locator("br").count() == 1
    assert md.locator("ol").get_attribute("start") == "3" and md.locator("ol > li").count() == 2
    assert md.locator("ol > li ul ul > li.task input").evaluate_all("l => l.map((x) => x.checked)") == [True, False]
    assert texts(page, ".assistant table tr:nth-child(1) td") == ["1", "x|y"]
    assert texts(page, ".assistant table tr:nth-child(2) td") == ["2", "|"]
    assert md.locator("th").evaluate_all("l => l.map((x) => getComputedStyle(x).textAlign)") == ["center", "right"]
    assert md.locator("blockquote em").inner_text() == "text" and md.locator("blockquote li").inner_text() == "item"
    assert md.locator("figure").count() == 2 and md.locator("hr").count() == 1
    code = md.locator("figure").first
    assert code.locator("figcaption span").inner_text() == "cpp"
    assert code.locator("code").inner_text().rstrip() == 'int main() { return 42; }  // "comment"\nconst char* s = "a // b";'
    assert code.locator(".hl-word").all_inner_texts() == ["int", "return", "const", "char"]
    assert code.locator(".hl-number").all_inner_texts() == ["42"] and code.locator(".hl-call").all_inner_texts() == ["main"]
    assert code.locator(".hl-comment").inner_text() == '// "comment"' and code.locator(".hl-string").inner_text() == '"a // b"'
    links = md.locator("a").evaluate_all("l => l.map((a) => [a.textContent, a.href, a.rel, a.target])")
    safe = "noopener noreferrer nofollow"
    assert links == [["https://example.com/a_(b)", "https://example.com/a_(b)", safe, "_blank"],
                     ["https://example.org/x", "https://example.org/x", safe, "_blank"],
                     ["name", "https://example.com/?q=1", safe, "_blank"], ["alt", "https://example.com/i.png", safe, "_blank"]]
    assert "[bad](javascript:alert(1)) [rel](/etc)" in md.inner_text()
    assert md.locator("p strong").last.inner_text() == "“加粗”"


def test_streamed_markdown_equals_the_whole(server, open_page):
    """Drawn piece by piece or at once: the same nodes."""
    page = open_page()
    same = page.evaluate("""async (text) => {
      const {showMarkdown} = await import('/markdown.js');
      const whole = document.createElement('div'), grown = document.createElement('div');
      showMarkdown(whole, text);
      for (let i = 0; i <= text.length; i += 3) showMarkdown(grown, text.slice(0, i));
      showMarkdown(grown, text);
      return [whole.innerHTML.length, whole.isEqualNode(grown)];
    }""", MARKDOWN)
    assert same[0] > 1000 and same[1]


def test_copy_buttons(server, open_page):
    server.replies = [Reply("Take `this`:\n\n```sh\nls -la\n```\n")]
    page = open_page()
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    ask(page, "copy")
    page.get_by_role("button", name="Copy code").click()
    assert page.evaluate("navigator.clipboard.readText()") == "ls -la"
    answer(page).get_by_role("button", name="Copy", exact=True).click()
    assert page.evaluate("navigator.clipboard.readText()") == "Take `this`:\n\n```sh\nls -la\n```\n"


HOSTILE = ["<script>pwned=1</script>", "<img src=x onerror=pwned=1>", "<svg onload=pwned=1>", "</div></article><iframe srcdoc='x'>",
           "[a](javascript:pwned=1)", "[a](java\tscript:pwned=1)", "[a](&#106;avascript:pwned=1)", "[a](data:text/html,<script>pwned=1</script>)",
           "[a](vbscript:x)", "![a](javascript:pwned=1)", "<javascript:pwned=1>", "[a](https://x.example/\"onmouseover=\"pwned=1)",
           "[<img src=x onerror=pwned=1>](https://x.example)", "`<img src=x onerror=pwned=1>`", "```\"><script>pwned=1</script>\n<b>x</b>\n```",
           "```html\n<script>pwned=1</script>\n```", "| <script>pwned=1</script> |\n|---|\n| <img src=x onerror=pwned=1> |",
           "# <b onclick=pwned=1>t</b>", "- <style>*{display:none}</style>", "> <base href=//x.example>", "<!-- --><meta http-equiv=refresh content=0>",
           "https://x.example/<img/src=x/onerror=pwned=1>", "**<form action=//x.example><button>x**", "\u202e\u0000<scr\u0000ipt>pwned=1</script>",
           "__proto__ ```__proto__\nconstructor\n```", "${pwned=1} {{pwned=1}} javascript:pwned=1"]


@pytest.mark.parametrize("policy", ["as shipped", "none"])
def test_text_never_becomes_code(server, open_page, policy):
    """Everything that comes from outside, in every place it is shown; also without the protection of the CSP."""
    if policy == "none":
        server.policy = "default-src * data: 'unsafe-inline' 'unsafe-eval'"
    evil = "\n\n".join(HOSTILE)
    short = "<img src=x onerror=pwned=1>"
    server.models = [short, "b"]
    server.blocks = {"block_size": short, "n_block": 4, "cached": [short, 1, -1, 9e9], "owners": [
        {"request": short, "choice": short, "n_tok": short, "running": 1, "blocks": [0, 1, "2", short, 99]}]}
    server.metrics = f"minimind_requests_running{{a=\"{short}\"}} 1\n{short} 3\nminimind_requests_waiting {short}\n"
    server.replies = [Reply({"think": evil}, *re.findall(r"[^ ]+ ?|\s", evil), *tool_call(0, short, evil), finish=short),
                      Reply("ok"), Reply(status=500, body={"error": {"message": short}})]
    page = open_page()
    ask(page, evil)
    page.locator(".think summary").click()
    page.locator(".tool textarea").fill(evil)
    page.get_by_role("button", name="Send result").click()
    done(page)
    ask(page, short)
    expect(page.locator(".problem:visible span")).to_contain_text(short)
    for panel in ("settings", "blocks", "server"):
        page.click(f"[data-panel={panel}]")
        page.wait_for_timeout(300)
    page.click("#panel-close")
    page.locator(".user").first.get_by_role("button", name="Edit").click()
    page.keyboard.press("Escape")
    assert page.title().startswith("<script>pwned=1")
    found = page.evaluate("""() => [window.pwned,
      document.querySelectorAll('script:not([src="/main.js"]), iframe, object, embed, form, base, style, meta[http-equiv], .msg img, .msg :is(b, style)').length,
      [...document.querySelectorAll('*')].filter((e) => [...e.attributes].some((a) => a.name.startsWith('on') || a.name === 'srcdoc')).length,
      [...document.querySelectorAll('a')].filter((a) => !/^https?:$/.test(a.protocol)).length,
      document.querySelectorAll('.msg a').length]""")
    assert found[:4] == [None, 0, 0, 0] and found[4] > 0
    expect(answer(page).locator(".problem span")).to_contain_text(short)  # shown, as the text that it is


def test_sources_use_nothing_that_makes_html():
    for path in WEB.glob("*"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function|DOMParser|srcdoc", text), path.name
    index = (WEB / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?! type=\"module\" src=\"/main.js\"></script>)|https?://", index)


PATHOLOGICAL = {
    "stars": "*a " * 30000, "double stars": "**a" * 20000, "underscores": "_" * 60000, "brackets": "[" * 60000, "links": "[a](" * 20000,
    "backticks": "".join("`" * (i % 50 + 1) + " " for i in range(3000)), "quotes": ">" * 60000, "nested lists": "- " * 30000,
    "deep lists": "".join(" " * (2 * i) + "- x\n" for i in range(300)), "pipes": "|" * 30000 + "\n" + "|-" * 30000,
    "fences": "```\n" * 20000, "urls": "https://" * 8000, "escapes": "\\" * 60000, "spaces": " " * 60000 + "x", "rules": "- " * 20000 + "x",
    "comment": "```js\n" + "/*" * 20000 + "\n```", "strings": "```py\n" + "'''\"" * 15000 + "\n```", "lines": "a\n" * 30000,
    "angles": "<http" * 12000, "tables": "a|b\n-|-\n" * 4000, "hashes": "# " * 20000,
    "heading of spaces": "# a" + " " * 60000 + "x", "fence of spaces": "```" + " " * 60000 + "`", "rule of spaces": "a|b\n-" + " " * 60000 + "x",
    "code of spaces": "` " + "a " * 30000 + "a`", "link of spaces": "[a](" + " " * 60000 + "x", "ticked cells": "`" + "|" * 60000 + "\n-|-",
    "items of spaces": "- " + " " * 60000 + "x", "closing brackets": "https://a.b/" + ")" * 60000, "stars in words": "a*" * 30000,
}


def test_no_text_makes_markdown_slow(server, open_page):
    page = open_page()
    ms = {name: page.evaluate("""async (text) => {
      const {showMarkdown} = await import('/markdown.js');
      const start = performance.now();
      showMarkdown(document.createElement('div'), text);
      return Math.round(performance.now() - start);
    }""", text) for name, text in PATHOLOGICAL.items()}
    assert all(value < 1500 for value in ms.values()), ms


# Thinking and tools --------------------------------------------------------------------------------------------------

def test_thinking_is_folded_with_its_duration(server, open_page):
    server.replies = [Reply({"think": "First "}, 0.7, {"think": "**then**."}, "Done.")]
    page = open_page()
    page.click("#think")
    ask(page, "think", wait=False)
    summary = answer(page).locator(".think summary")
    expect(summary).to_contain_text(re.compile(r"Thinking (\d+ ms|0\.\d s)"))
    done(page)
    number, unit = re.fullmatch(r"Thought for ([\d.]+) (ms|s)", summary.inner_text().strip()).groups()
    assert 0.5 <= float(number) / (1000 if unit == "ms" else 1) < 5
    assert answer(page).locator(".think .md").is_hidden()
    summary.click()
    expect(answer(page).locator(".think .md")).to_have_text("First then.")
    assert server.requests[0]["open_thinking"] is True
    ask(page, "again")
    assert "First" not in json.dumps(server.requests[1])  # thoughts are not sent back
    page.click("#think")
    ask(page, "no more")
    assert "open_thinking" not in server.requests[2]


TOOLS = [{"type": "function", "function": {"name": n, "parameters": {"type": "object"}}} for n in ("get_weather", "get_time")]


def test_tool_calls(server, open_page):
    server.replies = [Reply("Looking.", *tool_call(0, "get_weather", '{"city": "Berlin"}', "call_a"),
                            *tool_call(1, "get_time", '{"zone": "CET"}', "call_b"), finish="tool_calls"), Reply("Sunny at noon.")]
    page = open_page()
    page.click("[data-panel=settings]")
    page.fill("#set-tools", json.dumps(TOOLS))
    page.select_option("#set-tool_choice", "required")
    page.click("#panel-close")
    expect(page.locator("#tools-chip")).to_have_text("Tools: 2")
    ask(page, "weather?")
    assert server.requests[0]["tools"] == TOOLS and server.requests[0]["tool_choice"] == "required"
    cards = page.locator(".tool")
    assert cards.count() == 2
    expect(cards.first.locator("strong")).to_have_text("get_weather")
    assert json.loads(cards.first.locator("pre").inner_text()) == {"city": "Berlin"}
    cards.first.locator("textarea").fill("21 C")
    cards.last.locator("textarea").fill("12:00")
    page.get_by_role("button", name="Send results").click()
    expect(answer(page).locator(".md").last).to_have_text("Sunny at noon.")
    done(page)
    sent = server.requests[1]["messages"]
    assert roles(server.requests[1]) == ["user", "assistant", "tool", "tool"]
    assert sent[1]["tool_calls"] == [
        {"id": "call_a", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Berlin"}'}},
        {"id": "call_b", "type": "function", "function": {"name": "get_time", "arguments": '{"zone": "CET"}'}}]
    assert sent[1]["content"] == "Looking." and sent[2:] == [
        {"role": "tool", "tool_call_id": "call_a", "content": "21 C"}, {"role": "tool", "tool_call_id": "call_b", "content": "12:00"}]
    assert page.locator(".tool textarea").count() == 0 and "21 C" in page.locator(".tool").first.inner_text()
    page.reload()
    page.locator("#chats .open").click()
    assert page.locator(".tool").count() == 2 and "12:00" in page.locator(".tool").last.inner_text()


def test_a_call_without_result_is_not_sent_back(server, open_page):
    server.replies = [Reply(*tool_call(0, "f", "{}"), finish="tool_calls"), Reply("ok")]
    page = open_page()
    ask(page, "one")
    ask(page, "two")
    assert server.requests[1]["messages"] == [{"role": "user", "content": "one"}, {"role": "user", "content": "two"}]


# Settings ------------------------------------------------------------------------------------------------------------

VALUES = {"temperature": "0.7", "top_p": "0.9", "top_k": "40", "min_p": "0.05", "presence_penalty": "0.5", "frequency_penalty": "-0.5",
          "repetition_penalty": "1.1", "max_tokens": "128", "seed": "42"}
SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}}


def test_settings_go_into_the_request(server, open_page):
    page = open_page()
    page.click("[data-panel=settings]")
    for name, value in VALUES.items():
        page.fill(f"#set-{name}", value)
    page.fill("#set-system", "Be brief.")
    page.check("#set-think")
    page.fill("#set-schema", json.dumps(SCHEMA))
    ask(page, "hi")
    body = server.requests[0]
    assert {k: body[k] for k in VALUES} == {k: float(v) for k, v in VALUES.items()}
    assert body["messages"][0] == {"role": "system", "content": "Be brief."} and body["open_thinking"] is True
    assert body["response_format"] == {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": SCHEMA}}
    page.reload()
    page.click("[data-panel=settings]")
    assert page.input_value("#set-top_k") == "40" and page.is_checked("#set-think")
    page.get_by_role("button", name="Reset to defaults").click()
    ask(page, "hi")
    assert set(server.requests[1]) == {"model", "messages", "stream", "stream_options"}


@pytest.mark.parametrize("name, value, problem", [
    ("temperature", "9", "between 0 and 2"), ("temperature", "hot", "between 0 and 2"), ("top_k", "1.5", "between 0 and 1000000"),
    ("schema", "{", "Not valid JSON"), ("schema", "[1]", "Must be a JSON object"), ("tools", '{"a": 1}', "Must be a list"),
    ("tools", '[{"type": "function"}]', "Must be a list")])
def test_a_bad_setting_is_not_sent(server, open_page, name, value, problem):
    page = open_page()
    page.click("[data-panel=settings]")
    page.fill(f"#set-{name}", value)
    expect(page.locator(f"#bad-{name}")).to_contain_text(problem)
    page.click("#panel-close")
    ask(page, "hi", wait=False)
    expect(page.locator(f"#set-{name}")).to_be_focused()
    assert server.requests == [] and page.input_value("#input") == "hi" and page.locator(".msg").count() == 0


def test_examples_are_valid(server, open_page):
    page = open_page()
    page.click("[data-panel=settings]")
    for button in page.get_by_role("button", name="Insert an example").all():
        button.click()
    assert page.locator("#pane-settings [aria-invalid=true]").count() == 0
    ask(page, "hi")
    assert server.requests[0]["tools"][0]["function"]["name"] == "get_weather" and "response_format" in server.requests[0]


def test_several_models(server, open_page):
    server.models = ["a", "b"]
    page = open_page()
    page.locator("#model-box select").select_option("b")
    ask(page, "hi")
    page.reload()
    expect(page.locator("#model-box select")).to_have_value("b")
    assert server.requests[0]["model"] == "b"


# Messages and conversations ------------------------------------------------------------------------------------------

def numbered(server):
    server.answer = lambda body: Reply(f"answer {len(server.requests)}")


def test_regenerate_edit_delete_undo(server, open_page):
    numbered(server)
    page = open_page()
    for text in ("first", "second"):
        ask(page, text)
    answer(page).get_by_role("button", name="Answer again").click()
    done(page)
    assert texts(page, ".assistant .md:not(.think .md)") == ["answer 1", "answer 3"] and server.requests[1] == server.requests[2]
    page.locator(".user").first.hover()
    page.locator(".user").first.get_by_role("button", name="Edit").click()
    page.locator(".editor textarea").fill("changed")
    page.keyboard.press("Enter")
    expect(page.locator(".msg")).to_have_count(2)
    done(page)
    assert server.requests[3]["messages"] == [{"role": "user", "content": "changed"}]
    page.locator("#toast button").click()  # undo brings the old branch back
    expect(page.locator(".msg")).to_have_count(4)
    assert texts(page, ".bubble") == ["first", "second"]
    page.locator(".user").first.hover()
    page.locator(".user").first.get_by_role("button", name="Delete").click()
    assert texts(page, ".bubble") == ["second"] and page.locator(".assistant").count() == 1
    page.locator("#toast button").click()
    assert texts(page, ".bubble") == ["first", "second"]
    answer(page).get_by_role("button", name="Delete").click()
    assert page.locator(".msg").count() == 3
    page.locator(".user").last.get_by_role("button", name="Edit").click()
    page.keyboard.press("Escape")
    assert texts(page, ".bubble") == ["first", "second"] and page.locator(".editor").count() == 0


@pytest.mark.parametrize("how", ["again", "edit"])
def test_a_running_answer_gives_way(server, open_page, how):
    server.replies = [Reply("endless", end="hang"), Reply("new")]
    page = open_page()
    ask(page, "x", wait=False)
    expect(answer(page).locator(".md").last).to_have_text("endless")
    if how == "again":
        page.keyboard.press("Alt+r")
    else:
        page.keyboard.press("ArrowUp")
        page.keyboard.type("y")
        page.keyboard.press("Enter")
    expect(answer(page).locator(".md").last).to_have_text("new")
    done(page)
    assert page.locator(".msg").count() == 2 and texts(page, ".bubble") == ["x" if how == "again" else "xy"]


def test_conversations_are_kept(server, open_page):
    numbered(server)
    page = open_page()
    ask(page, "about cats")
    page.click("#new")
    ask(page, "about dogs")
    assert texts(page, "#chats .open") == ["about dogs", "about cats"]
    page.reload()
    expect(page.locator("#chats .open")).to_have_count(2)
    page.locator("#chats .open").nth(1).click()
    assert texts(page, ".bubble") == ["about cats"] and page.locator("#chats .open").nth(1).get_attribute("aria-current") == "true"
    ask(page, "more")
    assert [m["content"] for m in server.requests[2]["messages"]] == ["about cats", "answer 1", "more"]
    page.locator("#chats li").first.hover()
    page.get_by_role("button", name="Rename: about cats").click()
    page.locator(".rename").fill("Felines")
    page.keyboard.press("Enter")
    page.locator("#chats li").nth(1).hover()
    page.get_by_role("button", name="Delete: about dogs").click()
    assert texts(page, "#chats .open") == ["Felines"]
    page.locator("#toast button").click()
    assert sorted(texts(page, "#chats .open")) == ["Felines", "about dogs"]
    page.reload()
    assert sorted(texts(page, "#chats .open")) == ["Felines", "about dogs"]


def test_a_deleted_conversation_stays_deleted(server, open_page):
    server.replies = [Reply("endless", end="hang")]
    page = open_page()
    ask(page, "x", wait=False)
    expect(answer(page).locator(".md").last).to_have_text("endless")
    page.locator("#chats li").hover()
    page.get_by_role("button", name="Delete: x").click()
    expect(page.locator(".welcome")).to_be_visible()
    while not server.left:
        page.wait_for_timeout(50)
    page.wait_for_timeout(200)
    page.reload()
    expect(page.locator("#chats .empty")).to_be_visible()


def test_two_tabs(server, open_page):
    numbered(server)
    one = open_page()
    ask(one, "from one")
    two = one.context.new_page()
    two.goto(server.url)
    two.locator("#chats .open").click()
    ask(two, "from two")
    expect(one.locator(".bubble")).to_have_text(["from one", "from two"])
    two.click("#new")
    ask(two, "another")
    expect(one.locator("#chats .open")).to_have_text(["another", "from one"])
    assert texts(one, ".bubble") == ["from one", "from two"]


def test_an_answer_goes_on_in_the_background(server, open_page):
    server.replies = [Reply("slow ", 1.0, "end"), Reply("quick")]
    page = open_page()
    ask(page, "one", wait=False)
    expect(answer(page).locator(".md").last).to_have_text("slow")
    page.click("#new")
    expect(page.locator("#chats .dot")).to_have_count(1)
    ask(page, "two")
    expect(answer(page).locator(".md").last).to_have_text("quick")
    expect(page.locator("#chats .dot")).to_have_count(0)
    page.locator("#chats .open", has_text="one").click()
    expect(answer(page).locator(".md").last).to_have_text("slow end")


def test_a_reload_keeps_what_came(server, open_page):
    server.replies = [Reply("kept so far", 4.0, " more", end="hang")]
    page = open_page()
    ask(page, "x", wait=False)
    expect(answer(page).locator(".md").last).to_have_text("kept so far more")
    page.reload()
    page.locator("#chats .open").click()
    expect(answer(page).locator(".md").last).to_contain_text("kept so far")


def test_export_and_import(server, open_page, tmp_path):
    server.replies = [Reply({"think": "hm"}, "answer", *tool_call(0, "f", "{}"))]
    page = open_page()
    ask(page, "export me 中文")
    with page.expect_download() as download:
        page.click("#export")
    file = tmp_path / "chats.json"
    download.value.save_as(file)
    data = json.loads(file.read_text(encoding="utf-8"))
    assert download.value.suggested_filename.endswith(".json") and "key" not in data
    assert [m["role"] for m in data["conversations"][0]["messages"]] == ["user", "assistant"]
    other = open_page()
    for _ in range(2):  # the second time under new ids
        other.set_input_files("#import-file", file)
        expect(other.locator("#toast")).to_have_text("Conversations imported: 1")
    assert texts(other, "#chats .open") == ["export me 中文"] * 2
    other.reload()
    expect(other.locator("#chats .open")).to_have_count(2)
    other.locator("#chats .open").first.click()
    assert texts(other, ".bubble") == ["export me 中文"] and other.locator(".tool").count() == 1


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": "other"}', '{"format": "minimind-chats", "conversations": 3}'])
def test_other_files_are_not_imported(server, open_page, tmp_path, text):
    file = tmp_path / "x.json"
    file.write_text(text)
    page = open_page()
    page.set_input_files("#import-file", file)
    expect(page.locator("#toast")).to_have_text("This file holds no conversations of this page.")


def test_a_hostile_import_is_cleaned(server, open_page, tmp_path):
    messages = [{"role": "system", "content": "evil"}, {"role": "user", "content": {"a": 1}}, None, 7,
                {"role": "assistant", "content": "<img src=x onerror=pwned=1>", "tool_calls": [{"id": 5, "name": {}, "arguments": []}, None],
                 "reasoning": 3, "stats": {"ttft": "x", "rate": -1}, "error": ["x"], "reasoning_ms": "<b>"}]
    file = tmp_path / "x.json"
    file.write_text(json.dumps({"format": "minimind-chats", "conversations": [
        {"id": "../../x", "title": "<script>pwned=1</script>", "messages": messages}, {"messages": []}, 5, {"id": 1}]}))
    page = open_page()
    page.set_input_files("#import-file", file)
    expect(page.locator("#toast")).to_have_text("Conversations imported: 1")
    page.locator("#chats .open").click()
    assert texts(page, "#chats .open") == ["<script>pwned=1</script>"]
    expect(answer(page).locator(".md").last).to_have_text("<img src=x onerror=pwned=1>")
    assert page.evaluate("window.pwned") is None and page.locator(".msg").count() == 2


def test_storage_that_is_full_or_forbidden(server, open_page):
    full = "Storage.prototype.setItem = function () { throw new DOMException('full', 'QuotaExceededError'); };"
    page = open_page(setup=full)
    expect(page.locator("#toast")).to_contain_text("conversations are lost on reload")
    ask(page, "still works")
    expect(answer(page).locator(".md").last).to_have_text("Hello. How are you?")
    page = open_page()
    page.evaluate(f"() => {{ {full} }}")
    ask(page, "no room")
    expect(page.locator("#toast")).to_contain_text("no room left for conversations")
    expect(answer(page).locator(".md").last).to_have_text("Hello. How are you?")
