"""The chat page's markdown in headless Chromium: what it draws, that text never becomes code, that no text is slow."""
import re

import pytest
from page_actions import answer, ask, done, expect, texts
from page_samples import MARKDOWN
from page_server import WEB, Reply, tool_call


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
