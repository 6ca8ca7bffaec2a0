"""The chat page's messages and conversations in headless Chromium: edited, kept, shared by tabs, exported and imported."""
import json

import pytest
from page_actions import answer, ask, done, expect, texts
from page_server import Reply, tool_call


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
    assert texts(page, ".bubble") == ["about dogs"]  # the one that was open
    page.locator("#chats .open").nth(1).click()
    page.reload()
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
    page.click("#new")
    page.reload()
    expect(page.locator(".welcome")).to_be_visible()  # a new one stays a new one
    assert page.locator(".bubble").count() == 0


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
