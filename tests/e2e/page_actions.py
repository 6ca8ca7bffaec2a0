"""What the chat page's tests do with a page: ask, wait for the answer, read texts. Skips its importer without playwright."""
import pytest

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
