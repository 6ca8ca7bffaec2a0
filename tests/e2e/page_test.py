"""The chat page in headless Chromium: streams and their failures, thinking, tools, settings."""
import json
import re
import time

import pytest
from page_actions import answer, ask, done, expect
from page_samples import VALUES
from page_server import PageServer, Reply, tool_call


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
