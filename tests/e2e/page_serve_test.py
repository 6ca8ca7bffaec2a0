"""The chat page as `minimind serve` itself serves it."""
import json
import re

import pytest
from page_actions import answer, ask, done, expect, texts
from serving import serving
from support import TRAINED


@pytest.fixture(scope="module")
def model(trained):
    return TRAINED if TRAINED.is_dir() else trained("qwen3")


@pytest.fixture(scope="module")
def minimind_server(model):
    # Slow on purpose: an answer must still run when it is stopped.
    with serving(model, "--weights", "f32", "--kv-type", "f32", "--batch-invariant") as made:
        yield made


def settings(page, **values):
    page.click("[data-panel=settings]")
    for name, value in values.items():
        page.fill(f"#set-{name}", value)
    page.click("#panel-close")


def test_a_conversation(minimind_server, open_page):
    page = open_page(minimind_server.url)
    expect(page.locator("#model-box")).to_have_text("tiny")
    settings(page, max_tokens="24", seed="3", temperature="0.8", top_k="20", min_p="0.01", repetition_penalty="1.1", system="Be brief.")
    ask(page, "你好，你是谁？ Who are you?")
    first = answer(page).locator(".md").last.inner_text()
    stats = answer(page).locator(".stats").inner_text().replace("\n", "")
    seen = re.search(r"^(\d+) tokens.*?([\d,]+) tok/s.*first token [\d.]+ m?s.*prompt (\d+)", stats)
    assert seen and 1 <= int(seen[1]) <= 24 and int(seen[2].replace(",", "")) > 1 and int(seen[3]) > 5, stats
    answer(page).get_by_role("button", name="Answer again").click()
    done(page)
    assert answer(page).locator(".md").last.inner_text() == first  # the seed is used
    expect(answer(page).locator(".stats")).to_contain_text("from cache")
    ask(page, "继续")
    assert page.locator(".msg").count() == 4 and page.locator(".problem:visible").count() == 0


def test_json_schema_and_tools(minimind_server, open_page):
    page = open_page(minimind_server.url)
    schema = {"type": "object", "properties": {"n": {"type": "integer", "minimum": 1, "maximum": 9}}, "required": ["n"],
              "additionalProperties": False}
    settings(page, schema=json.dumps(schema))
    ask(page, "A number, please.")
    assert 1 <= json.loads(answer(page).locator(".md").last.inner_text())["n"] <= 9
    tools = [{"type": "function", "function": {"name": "roll", "parameters": schema}}]
    settings(page, schema="", tools=json.dumps(tools), max_tokens="60")
    page.click("[data-panel=settings]")
    page.select_option("#set-tool_choice", "required")
    page.click("#panel-close")
    ask(page, "Roll.")
    expect(page.locator(".tool strong").first).to_have_text("roll")
    assert set(json.loads(page.locator(".tool pre").first.inner_text())) == {"n"}
    settings(page, tools="")
    for area in page.locator(".tool textarea").all():
        area.fill("6")
    page.locator(".calls .strong").click()
    done(page)
    assert page.locator(".problem:visible").count() == 0 and "6" in page.locator(".tool").first.inner_text()


def test_stop_and_blocks(minimind_server, open_page):
    before = minimind_server.metrics()
    page = open_page(minimind_server.url)
    settings(page, max_tokens="4")
    ask(page, "One answer in full.")
    settings(page, max_tokens="1500", schema=json.dumps({"type": "string", "minLength": 100000}))  # it has much to say
    page.click("[data-panel=blocks]")
    ask(page, "Go on for a long time.", wait=False)
    expect(page.locator(".sequences button")).to_have_count(1)
    page.locator(".sequences button").click()
    rows = page.locator("#pane-blocks tbody tr")
    expect(rows.nth(2)).to_be_visible()
    assert texts(page, "#pane-blocks tbody tr td:first-child")[:3] == ["0", "1", "2"]
    page.keyboard.press("Escape")
    done(page)
    expect(answer(page).locator(".stats")).to_contain_text("Stopped by you")
    expect(page.locator(".sequences")).to_contain_text("No sequence is in the cache now")
    expect(page.locator(".legend")).to_contain_text(re.compile(r"cached\s*[1-9]"))
    minimind_server.wait(lambda: minimind_server.metrics()["minimind_requests_cancelled_total"] > before["minimind_requests_cancelled_total"])
    page.click("#tab-server")
    expect(page.locator(".tile dd").first).to_have_text("0")
    expect(page.locator(".tile dd").nth(4)).to_have_text(re.compile(r"^[\d.]+ m?s$"))
    assert page.locator(".tile dd", has_text="–").count() == 0  # every number was found in /metrics
    expect(page.locator("#pane-server > p").last).to_contain_text("cpu, 2 threads")


def test_errors_of_the_server(minimind_server, open_page):
    page = open_page(minimind_server.url)
    settings(page, schema='{"type": "nonsense"}')
    ask(page, "hi")
    expect(answer(page).locator(".problem span")).to_contain_text("The server answered with error 400: ")
    settings(page, schema="", max_tokens="4")
    page.get_by_role("button", name="Try again").click()
    done(page)
    assert page.locator(".problem:visible").count() == 0


def test_a_server_with_a_key(model, open_page):
    with serving(model, env={"MINIMIND_API_KEY": "sesame"}) as made:
        page = open_page(made.url)
        expect(page.locator("#auth")).to_be_visible()
        page.fill("#auth-key", "sesame")
        page.press("#auth-key", "Enter")
        expect(page.locator("#model-box")).to_have_text("tiny")
        settings(page, max_tokens="4")
        ask(page, "hi")
        assert page.locator(".problem:visible").count() == 0 and page.locator("#auth").is_hidden()
        page.click("[data-panel=blocks]")
        expect(page.locator(".legend")).to_contain_text("cached")
