"""Fixtures of several files: a model that talks; for the chat page's tests a headless Chromium, a server that plays along,
pages that must not complain."""
import json
import os
import shutil

import pytest
from page_server import PageServer
from support import CONFIGS, TRAINED, output


@pytest.fixture(scope="session")
def model(corpus, chats, tokenizer_dir, tmp_path_factory):
    """A model that talks, or one made here in a few seconds that says anything."""
    if TRAINED.is_dir():
        return TRAINED
    folder = tmp_path_factory.mktemp("serve")
    (folder / "config.json").write_text(json.dumps({**CONFIGS["qwen3"], "max_position_embeddings": 2048}))
    args = ["--steps", 120, "--batch-size", 8, "--accumulation-steps", 1, "--lr", 3e-3, "--quiet"]
    output("pretrain", "--data", corpus, "--tokenizer", tokenizer_dir, "--preset", folder / "config.json", "--seq-len", 64,
           "--output", folder / "base", *args)
    output("sft", "--data", chats, "--model", folder / "base", "--seq-len", 128, "--output", folder / "chat", *args)
    return folder / "chat"


def chromium_path():
    """Where a Chromium is, or None: $MINIMIND_CHROMIUM, Debian's package, Chrome."""
    named = os.environ.get("MINIMIND_CHROMIUM")
    return named or next(filter(None, map(shutil.which, ["chromium", "chromium-browser", "google-chrome"])), None)


@pytest.fixture(scope="session")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (tests/requirements.txt)")
    path = chromium_path()
    if path is None:
        pytest.skip("the chat page was not tested: no Chromium here; make setup-dev installs it")
    with api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=["--disable-dev-shm-usage"])
        yield chromium
        chromium.close()


@pytest.fixture
def server():
    made = PageServer()
    yield made
    made.close()


@pytest.fixture
def open_page(browser, server):
    """open_page(...): a page of a fresh browser profile; fails the test if the page throws, logs an error, breaks its
    Content-Security-Policy or asks anyone but its server for anything."""
    contexts, complaints = [], []

    def new(url=None, allow=(), setup=None, **options):
        options = {"viewport": {"width": 1280, "height": 800}, "locale": "en-US", **options}
        context = browser.new_context(**options)
        contexts.append(context)
        context.set_default_timeout(20000)
        page = context.new_page()
        base = url or server.url

        def console(message):
            expected = message.text.startswith("Failed to load resource") or any(a in message.text for a in allow)
            if message.type in ("error", "warning") and not expected:
                complaints.append(f"console: {message.text}")

        page.on("console", console)
        page.on("pageerror", lambda error: complaints.append(f"exception: {error}"))
        page.on("request", lambda r: None if r.url.startswith((base, "blob:")) else complaints.append(f"asked for {r.url}"))
        if setup:
            page.add_init_script(setup)
        page.goto(base)
        page.locator("html[data-theme]").wait_for()
        return page

    yield new
    for context in contexts:
        context.close()
    assert not complaints, "\n".join(complaints)
