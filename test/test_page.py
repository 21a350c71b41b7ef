"""The chat page in headless Chromium, against a stand-in of the server and against the server.

    python test/test_page.py --screenshots     # draws docs/page.png and docs/page-phone.png

Needs playwright (pip install playwright) and a Chromium: playwright's, or the system's.
"""

import argparse
import contextlib
import importlib.util
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parent)]
from page_stub import MARKDOWN, Stub

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "models/refrain-mini"
DESKTOP, PHONE = {"width": 1280, "height": 800}, {"width": 390, "height": 844}
SYSTEM_BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")

playwright = pytest.importorskip("playwright.sync_api", reason="the chat page: no playwright")
expect = playwright.expect
Page, Open = playwright.Page, Callable[..., playwright.Page]


@contextlib.contextmanager
def chromium() -> Iterator[playwright.Browser | None]:
    with playwright.sync_playwright() as driver:
        own = driver.chromium.executable_path
        path = (
            own
            if Path(own).exists()
            else next(filter(None, map(shutil.which, SYSTEM_BROWSERS)), None)
        )
        # as root, as in containers, Chromium has no sandbox
        args = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = path and driver.chromium.launch(executable_path=path, args=args)
        yield browser
        if browser:
            browser.close()


@contextlib.contextmanager
def real_server(*arguments: str) -> Iterator[str]:
    """The address of a server of the embedded model."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "llaisys",
        "serve",
        str(MODEL),
        "--port",
        str(port),
        *arguments,
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "bindings")}
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryFile("w+") as log:
        server = subprocess.Popen(command, env=environment, stderr=log)
        try:
            for _ in range(200):
                if server.poll() is not None:
                    log.seek(0)
                    raise RuntimeError(log.read())
                with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health"):
                    break
                time.sleep(0.1)
            yield url
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(60)


@pytest.fixture(scope="module")
def browser() -> Iterator[playwright.Browser]:
    with chromium() as found:
        if not found:
            pytest.skip(
                "the chat page: no Chromium (playwright install chromium, or apt-get install chromium)"
            )
        yield found


@pytest.fixture
def stub() -> Iterator[Stub]:
    server = Stub()
    yield server
    server.close()


@pytest.fixture
def open_page(browser: playwright.Browser) -> Iterator[Open]:
    """Opens a page; in the end looks for what must never happen on it."""
    contexts, problems = [], []

    def note(message: playwright.ConsoleMessage) -> None:
        # an answer of 401, 429 and the like is in the console, too
        if message.type in ("error", "warning") and "Failed to load resource" not in message.text:
            problems.append(message.text)

    def visit(
        url: str, context: playwright.BrowserContext | None = None, **options: object
    ) -> Page:
        if not context:
            context = browser.new_context(**{"viewport": DESKTOP} | options)
            contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(10_000)
        page.on("console", note)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on(
            "request",
            lambda asked: asked.url.startswith(url.split("#")[0]) or problems.append(asked.url),
        )
        page.goto(url)
        return page

    yield visit
    for context in contexts:
        for page in context.pages:
            assert page.evaluate("window.hacked") is None
        context.close()
    assert not problems


@pytest.fixture
def page(stub: Stub, open_page: Open) -> Page:
    page = open_page(stub.url)
    expect(page.locator("#model")).to_have_value("stub")
    return page


def ask(page: Page, text: str, wait: bool = True) -> None:
    page.fill("#question", text)
    page.click("#send")
    if wait:
        done(page)


def done(page: Page) -> None:
    expect(page.locator("#send")).to_be_visible(timeout=20_000)


def last(page: Page) -> playwright.Locator:
    return page.locator(".assistant").last


def chats(page: Page) -> playwright.Locator:
    return page.locator("#chats .open")


# ---- asking ----


def test_send_and_stream(page: Page, stub: Stub) -> None:
    expect(page.locator("#welcome")).to_be_visible()
    ask(page, "slow", wait=False)
    expect(last(page)).to_contain_text("word3")
    assert "word1999" not in last(page).inner_text()
    assert last(page).get_attribute("aria-busy") == "true"
    expect(last(page).locator(".stats")).to_have_text(re.compile(r"TTFT \d+ ms"))
    page.click("#stop")
    words = " ".join(f"w{i}" for i in range(50))
    ask(page, words)
    expect(page.locator("#welcome")).to_be_hidden()
    expect(last(page).locator(".markdown").last).to_have_text(f"You said: {words}")
    stats = last(page).locator(".stats").inner_text()
    assert re.fullmatch(r"52 tokens · [\d.]+ tokens/s · TTFT \d+ ms · 80 of 120 cached", stats), (
        stats
    )
    assert last(page).get_attribute("aria-busy") == "false"
    assert [m["role"] for m in stub.asked[-1]["messages"]] == ["user", "assistant", "user"]
    assert stub.asked[-1]["stream_options"] == {"include_usage": True}
    assert stub.asked[-1]["model"] == "stub"
    # what a balancer may hash, so that a chat stays with the replica that has it cached
    assert page.url.endswith(stub.sessions[-1])


def test_examples_can_be_asked(page: Page) -> None:
    page.click("#examples button >> nth=1")
    expect(last(page)).to_contain_text("You said: What is 12 + 30?")


@pytest.mark.parametrize("how", ["Escape", "button"])
def test_stop(page: Page, stub: Stub, how: str) -> None:
    ask(page, "slow", wait=False)
    expect(last(page)).to_contain_text("word2")
    page.keyboard.press("Escape") if how == "Escape" else page.click("#stop")
    expect(last(page)).to_contain_text("Stopped.")
    text = last(page).inner_text()
    page.wait_for_timeout(200)
    assert last(page).inner_text() == text
    assert stub.aborted == 1
    ask(page, "more")
    assert stub.asked[-1]["messages"][1]["content"].startswith("word0 word1")


def test_thoughts_are_folded_and_not_sent_back(page: Page, stub: Stub) -> None:
    ask(page, "think")
    think = last(page).locator("details")
    expect(think.locator("summary")).to_have_text(re.compile(r"Thought for \d+ ms"))
    expect(think.locator("strong")).to_be_hidden()
    think.locator("summary").click()
    expect(think.locator("strong")).to_have_text("hard")
    ask(page, "more")
    expect(page.locator("details strong")).to_be_visible()  # still unfolded
    assert "hard" not in str(stub.asked[-1])


def test_edit_keeps_both_versions(page: Page, stub: Stub) -> None:
    ask(page, "first")
    ask(page, "second")
    page.hover(".user >> nth=0")
    page.click("[aria-label='Edit question'] >> nth=0")
    page.keyboard.press("Escape")
    expect(page.locator(".user").first).to_contain_text("first")
    page.click("[aria-label='Edit question'] >> nth=0")
    page.fill(".editor textarea", "changed")
    page.keyboard.press("Enter")
    done(page)
    expect(page.locator(".user")).to_have_count(1)
    assert stub.asked[-1]["messages"] == [{"role": "user", "content": "changed"}]
    expect(page.locator(".versions")).to_have_text("2/2")
    page.click("[aria-label='Earlier version']")
    expect(page.locator(".user .text")).to_have_text(["first", "second"])
    page.reload()
    expect(page.locator(".user .text")).to_have_text(["first", "second"])
    page.click("[aria-label='Later version']")
    expect(page.locator(".user .text")).to_have_text(["changed"])


def test_regenerate(page: Page, stub: Stub) -> None:
    ask(page, "first")
    page.click("[aria-label='Regenerate']")
    expect(last(page)).to_contain_text("You said: first (1)")
    done(page)
    assert stub.asked[0] == stub.asked[1]
    expect(last(page).locator(".versions")).to_have_text("2/2")
    page.click("[aria-label='Earlier version']")
    expect(last(page).locator(".markdown").last).to_have_text("You said: first")
    ask(page, "second")
    assert stub.asked[-1]["messages"][1]["content"] == "You said: first"


# ---- chats ----


def test_chats_go_on_while_another_is_shown(page: Page) -> None:
    ask(page, "slow", wait=False)
    expect(last(page)).to_contain_text("word2")
    page.keyboard.press("Control+k")
    expect(page.locator("#welcome")).to_be_visible()
    expect(page.locator("#question")).to_be_focused()
    ask(page, "another")
    expect(chats(page)).to_have_text(["another", "slow"])
    expect(page.locator("#chats .running")).to_have_count(1)
    page.click("#chats .open >> text=slow")
    before = len(last(page).inner_text())
    page.wait_for_timeout(300)
    assert len(last(page).inner_text()) > before > 0
    page.keyboard.press("Escape")
    expect(page.locator("#chats .running")).to_have_count(0)
    page.go_back()
    expect(last(page)).to_contain_text("You said: another")


def test_search_rename_delete_undo(page: Page) -> None:
    for text in ("apples", "pears"):
        page.click("#new")
        ask(page, text)
    page.fill("#search", "said APPLES")
    expect(chats(page)).to_have_text(["apples"])
    page.fill("#search", "plums")
    expect(page.locator("#chats")).to_have_text("No chat has these words.")
    page.fill("#search", "")
    page.click("[aria-label='Rename pears']")
    page.keyboard.type("<b>fruit</b>")
    page.keyboard.press("Enter")
    expect(chats(page)).to_have_text(["<b>fruit</b>", "apples"])
    page.click("[aria-label='Delete <b>fruit</b>']")
    expect(chats(page)).to_have_text(["apples"])
    expect(page.locator("#welcome")).to_be_visible()
    page.click("text=Undo")
    expect(chats(page)).to_have_text(["<b>fruit</b>", "apples"])
    expect(last(page)).to_contain_text("You said: pears")
    page.click("[aria-label='Delete <b>fruit</b>']")
    page.reload()
    expect(chats(page)).to_have_text(["apples"])


def test_reload_keeps_chats_and_half_an_answer(page: Page) -> None:
    ask(page, "first")
    ask(page, "slow", wait=False)
    expect(last(page)).to_contain_text("word5")
    page.reload()
    expect(page.locator(".user .text")).to_have_text(["first", "slow"])
    expect(last(page)).to_contain_text("word5")
    expect(last(page)).to_contain_text("The page was closed before the answer ended.")
    last(page).get_by_text("Try again").click()
    expect(last(page)).to_contain_text("word3")


def test_tabs_see_each_other(page: Page, stub: Stub, open_page: Open) -> None:
    ask(page, "first")
    other = open_page(page.url, context=page.context)
    expect(last(other)).to_contain_text("You said: first")
    ask(page, "second")
    expect(last(other)).to_contain_text("You said: second")


def test_full_storage_is_told(page: Page) -> None:
    page.evaluate(
        "for (let n = 1 << 22, i = 0; n > 10; n >>= 1)"
        "  try { localStorage.setItem(`x${i++}`, 'x'.repeat(n)); } catch {}"
    )
    ask(page, "first")
    expect(last(page)).to_contain_text("You said: first")
    expect(page.locator("#toast")).to_contain_text("storage is full")


# ---- hostile and large answers ----


def test_hostile_answers_stay_text(page: Page) -> None:
    ask(page, "hostile")
    shown = last(page).locator(".markdown").last
    expect(shown).to_contain_text("<script>window.hacked = 1</script>")
    expect(
        shown.locator("script, img, iframe, object, embed, style, form, base, link")
    ).to_have_count(0)
    for link in shown.locator("a").all():
        assert link.get_attribute("href").startswith("https://example.com/")
        assert link.get_attribute("rel") == "noopener noreferrer nofollow"
    handlers = "e => e.getAttributeNames().some(n => n.startsWith('on') || n === 'style')"
    assert not shown.evaluate(f"e => [...e.querySelectorAll('*')].some({handlers})")


def test_policy_holds_without_the_page(stub: Stub, browser: playwright.Browser) -> None:
    """Were there a hole in the page, the policy that the server sends would still stop the script."""
    page = browser.new_page()
    page.goto(stub.url)
    hole = "<img src=x onerror='window.hacked = 1'><iframe srcdoc='<script>parent.hacked = 2</script>'>"
    page.evaluate("html => document.body.insertAdjacentHTML('beforeend', html)", hole)
    page.wait_for_timeout(200)
    assert page.evaluate("window.hacked") is None
    page.close()


def test_huge_answers_do_not_hang_the_page(page: Page) -> None:
    page.evaluate(
        "window.gap = 0; let last = performance.now();"
        "setInterval(() => { const now = performance.now(); gap = Math.max(gap, now - last); last = now; }, 10)"
    )
    ask(page, "huge")
    text = last(page).locator(".markdown").last.inner_text()
    assert "Line 2999 of many." in text
    assert text.endswith("a" * 1000)
    assert page.evaluate("document.querySelector('#scroller').scrollWidth <= innerWidth")
    gap = page.evaluate("gap")
    assert gap < 1500, f"the page stood still for {gap:.0f} ms"


def test_markdown(page: Page) -> None:
    ask(page, "markdown")
    shown = last(page).locator(".markdown").last
    for selector, texts in {
        "h2": ["Title"],
        "p strong": ["bold", "both"],
        "em": ["italic", "both"],
        "del": ["gone"],
        ":not(pre) > code": ["code <b>", "x|y"],
        "a": ["link", "https://example.com/c"],
        "ol > li > ul > li": ["inner x"],
        "ol > li > .code pre": ['print("in a list")'],
        ".task": ["☑ done"],
        "blockquote blockquote": ["twice"],
        "td": ["1", "x|y"],
        "pre.math": [r"\[ E = mc^2 \]"],
        "span.math": [r"\(a_1 * b_2 * c\)"],
    }.items():
        expect(shown.locator(selector)).to_have_text(texts)
    expect(shown.locator("a").first).to_have_attribute("href", "https://example.com/a_(b)")
    for text in ("snake_case_name and 2 * 3 * 4.", "1984. was a year", "*stars*"):
        expect(shown).to_contain_text(text)
    # word by word or at once, it looks the same
    streamed = shown.inner_html()
    page.reload()
    expect(last(page).locator("pre.math")).to_be_visible()
    assert last(page).locator(".markdown").last.inner_html() == streamed


RANDOM_MARKDOWN = r"""async ([seed, count]) => {
  const { MarkdownView } = await import("/page/markdown.js");
  const parts = ["a", "b ", "\n", "\n\n", "- ", "-\n", "1. ", "2) ", "   ", "```", "```py\n", "~~~\n", "> ", "# ",
    "|", "|---|---|\n", "| a | b |\n", "**", "*", "_", "~~", "`", "[", "](", "http://a.b", ")", "<br>", "\\[",
    "\\]", "$$", "---\n", "\\(", "!", "\t", "\r\n", "[x] ", "<b>", "javascript:", "\u5b57", "\ud83d\ude00"];
  const random = (below) => (seed = (seed * 48271) % 2147483647) % below;
  const allowed = /^(P|H[2-6]|HR|BR|UL|OL|LI|BLOCKQUOTE|PRE|CODE|DIV|SPAN|BUTTON|svg|use|TABLE|THEAD|TBODY|TR|TH|TD|EM|STRONG|DEL|A)$/;
  for (let i = 0; i < count; i++) {
    const text = Array.from({ length: random(60) }, () => parts[random(parts.length)]).join("");
    const [once, grown] = [document.createElement("div"), document.createElement("div")];
    new MarkdownView(once).show(text);
    const view = new MarkdownView(grown);
    for (let end = 0; end <= text.length; end += 1 + random(4)) view.show(text.slice(0, end));
    view.show(text);
    if (once.innerHTML !== grown.innerHTML) return ["differs when streamed", text];
    const odd = [...once.querySelectorAll("*")].find((e) => !allowed.test(e.tagName) || (e.href && !/^http/.test(e.href.baseVal ?? e.href) && e.tagName === "A"));
    if (odd) return ["has an element that it should not", text, odd.outerHTML];
  }
}"""


def test_random_markdown(page: Page) -> None:
    """Any text is shown, the same word by word as at once, and with known elements alone."""
    assert page.evaluate(RANDOM_MARKDOWN, [7, 2000]) is None


def test_copy(page: Page) -> None:
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    ask(page, "markdown")
    for label, text in {
        "Copy code": 'print("in a list")',
        "Copy answer": MARKDOWN,
        "Copy question": "markdown",
    }.items():
        page.click(f"[aria-label='{label}']")
        expect(page.locator("#status")).to_have_text("Copied")
        assert page.evaluate("navigator.clipboard.readText()").strip() == text.strip()
        page.evaluate("document.querySelector('#status').textContent = ''")


def test_copy_without_a_clipboard(stub: Stub, open_page: Open) -> None:
    """On an address in the local network the browser offers none."""
    page = open_page(stub.url)
    page.evaluate("Object.defineProperty(navigator, 'clipboard', { value: undefined })")
    ask(page, "first")
    page.click("[aria-label='Copy answer']")
    expect(page.locator("#status")).to_have_text("Copied")


# ---- errors ----


@pytest.mark.parametrize(
    ("question", "words"),
    {
        "busy": "The server is busy with others. the queue is full Try again in 2 s.",
        "too long": "the prompt has 9000 tokens, room is for 4096",
        "drop": "The connection ended before the answer did.",
        "fail": "the engine failed: <b>no</b> reason",
    }.items(),
)
def test_errors_in_words(page: Page, stub: Stub, question: str, words: str) -> None:
    ask(page, question)
    expect(last(page).get_by_role("alert")).to_have_text(words)
    last(page).get_by_text("Try again", exact=True).click()
    done(page)
    assert len(stub.asked) == 2
    assert stub.asked[0] == stub.asked[1]
    if question == "busy":
        expect(page.locator(".assistant")).to_have_count(1)
        expect(last(page)).to_contain_text("You said: busy")


def test_cut_answers_say_so(page: Page) -> None:
    ask(page, "length")
    expect(last(page)).to_contain_text("Cut off at the most tokens")


def test_no_server(page: Page, stub: Stub) -> None:
    page.route("**/v1/chat/completions", lambda route: route.abort())
    ask(page, "anyone?")
    expect(last(page).get_by_role("alert")).to_have_text(
        "The server cannot be reached. Is it running?"
    )
    page.unroute("**/v1/chat/completions")
    last(page).get_by_text("Try again").click()
    expect(last(page)).to_contain_text("You said: anyone?")


def test_server_that_loads(stub: Stub, open_page: Open) -> None:
    stub.is_loading = True
    page = open_page(stub.url)
    expect(page.locator("#banner")).to_contain_text("starting up or shutting down")
    stub.is_loading = False
    expect(page.locator("#model")).to_have_value("stub")
    expect(page.locator("#banner")).to_be_hidden()


def test_key_is_asked_for(stub: Stub, open_page: Open) -> None:
    stub.key = "secret"
    page = open_page(stub.url)
    dialog = page.locator("#settings")
    expect(dialog).to_contain_text("The server asks for an API key.")
    expect(page.locator("[name=key]")).to_be_focused()
    page.keyboard.type("wrong")
    page.keyboard.press("Enter")
    expect(dialog).to_contain_text("no valid API key")
    page.fill("[name=key]", "secret")
    page.keyboard.press("Enter")
    expect(page.locator("#model")).to_have_value("stub")
    ask(page, "first")
    expect(last(page)).to_contain_text("You said: first")
    page.reload()
    expect(page.locator("#model")).to_have_value("stub")
    expect(dialog).to_be_hidden()


# ---- settings, looks, keys ----


def test_settings_are_sent(page: Page, stub: Stub) -> None:
    ask(page, "first")
    values = {"temperature": 0.7, "top_p": 0.9, "top_k": 40, "max_tokens": 100, "seed": 7}
    assert stub.asked[-1].keys() == {"model", "messages", "stream", "stream_options"}
    page.click("#settings-open")
    for name, value in (("temperature", "3"), ("seed", "9" * 20), ("max_tokens", "9" * 10)):
        page.fill(f"[name={name}]", value)
        page.click("dialog .primary")
        expect(page.locator("#settings .error")).to_be_visible()
        page.fill(f"[name={name}]", "")
    for name, value in values.items():
        page.fill(f"[name={name}]", str(value))
    page.fill("[name=system]", "Be brief.")
    page.select_option("[name=think]", "on")
    page.click("dialog .primary")
    expect(page.locator("#settings")).to_be_hidden()
    page.select_option("#model", "other")
    ask(page, "second")
    asked = stub.asked[-1]
    assert {name: asked[name] for name in values} == values
    assert asked["messages"][0] == {"role": "system", "content": "Be brief."}
    assert asked["model"] == "other"
    assert asked["chat_template_kwargs"] == {"enable_thinking": True}
    page.reload()
    page.click("#new")
    ask(page, "third")
    assert {name: stub.asked[-1][name] for name in values} == values
    assert stub.asked[-1]["model"] == "other"


def test_dark_and_light(stub: Stub, open_page: Open) -> None:
    page = open_page(stub.url, color_scheme="dark")
    dark = ground(page)
    page.click("#theme")
    light = ground(page)
    assert sum(dark) < 150
    assert sum(light) > 600
    page.reload()
    assert ground(page) == light
    page.click("#theme")
    assert ground(page) == dark
    page.emulate_media(color_scheme="light")
    assert ground(page) == light


def ground(page: Page) -> list[int]:
    color = page.evaluate("getComputedStyle(document.body).backgroundColor")
    return [int(part) for part in re.findall(r"\d+", color)[:3]]


def test_phone(stub: Stub, open_page: Open) -> None:
    page = open_page(stub.url, viewport=PHONE, has_touch=True, is_mobile=True)
    expect(page.locator("#sidebar")).to_be_hidden()
    page.fill("#question", "one")
    page.keyboard.press("Enter")  # there is no Shift+Enter on a phone
    assert not stub.asked
    page.fill("#question", "markdown")
    page.tap("#send")
    done(page)
    assert page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
    assert page.evaluate("document.querySelector('#scroller').scrollWidth") == PHONE["width"]
    for selector in ("#question", "#send", "#menu", "#settings-open"):
        box = page.locator(selector).bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= PHONE["width"]
        assert box["y"] + box["height"] <= PHONE["height"]
        assert box["height"] >= 36  # a fingertip
    page.tap("[aria-label='Edit question']")  # there without hovering
    page.tap("text=Cancel")
    page.tap("#menu")
    expect(page.locator("#new")).to_be_focused()
    page.keyboard.press("Escape")
    expect(page.locator("#sidebar")).to_be_hidden()
    page.tap("#menu")
    page.touchscreen.tap(380, 400)
    expect(page.locator("#sidebar")).to_be_hidden()
    page.tap("#menu")
    page.tap("#new")
    expect(page.locator("#sidebar")).to_be_hidden()
    expect(page.locator("#welcome")).to_be_visible()
    page.tap("#settings-open")
    box = page.locator("#settings").bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= PHONE["width"]


def test_keyboard(page: Page, stub: Stub) -> None:
    expect(page.locator("#question")).to_be_focused()
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    assert not stub.asked
    # the Enter that ends the input of a Chinese word
    page.dispatch_event("#question", "keydown", {"key": "Enter", "isComposing": True})
    assert not stub.asked
    page.keyboard.press("Enter")
    done(page)
    assert stub.asked[0]["messages"][0]["content"] == "one\ntwo"
    assert page.evaluate("document.querySelector('#question').value") == ""
    # from the top, everything is reached, in the order of the page, and it can be seen
    page.evaluate("document.activeElement.blur()")
    page.reload()
    page.locator(".skip").focus()
    order = []
    for _ in range(18):
        page.keyboard.press("Tab")
        order.append(
            page.evaluate(
                "document.activeElement.id || document.activeElement.ariaLabel || document.activeElement.className"
            )
        )
        assert page.evaluate(
            "getComputedStyle(document.activeElement).outlineStyle !== 'none' || document.activeElement.id === 'question'"
        ), order
        if order[-1] == "question":
            break
    expected = [
        "new",
        "search",
        "open",
        "Rename one",
        "Delete one",
        "menu",
        "model",
        "theme",
        "settings-open",
    ]
    assert order == [
        *expected,
        "scroller",
        "Copy question",
        "Edit question",
        "Copy answer",
        "Regenerate",
        "question",
    ]


def test_accessible(page: Page) -> None:
    """Names, roles, contrast and the like, by the rules of axe."""
    axe = pytest.importorskip(
        "axe_playwright_python", reason="the chat page: no axe-playwright-python"
    )
    rules = next(Path(axe.__file__).parent.rglob("axe.min.js")).read_text(encoding="utf-8")
    page.evaluate(rules)

    def check() -> None:
        found = page.evaluate("axe.run()")["violations"]
        assert [(v["id"], [n["target"] for n in v["nodes"]]) for v in found] == []

    check()
    for question in ("think", "markdown", "fail"):
        ask(page, question)
    page.click("summary")
    check()
    page.emulate_media(color_scheme="dark")
    check()
    page.click("#settings-open")
    check()


# ---- the server itself ----


@pytest.fixture(scope="module")
def server_url() -> Iterator[str]:
    if not importlib.util.find_spec("llaisys.server.run"):
        pytest.skip("the chat page against the server: no server in this tree")
    with real_server() as url:
        yield url


def test_with_the_server(server_url: str, open_page: Open) -> None:
    page = open_page(server_url)
    expect(page.locator("#model")).to_have_value("refrain-mini")
    ask(page, "What is 12 + 30?")
    expect(last(page).locator(".markdown").last).to_contain_text("42")
    expect(last(page).locator(".stats")).to_contain_text("tokens/s")
    ask(page, "Who are you?")
    first = last(page).locator(".markdown").last.inner_text()
    page.click("[aria-label=Regenerate] >> nth=1")
    done(page)
    cached = re.search(r"(\d+) of (\d+) cached", last(page).locator(".stats").inner_text())
    assert 0 < int(cached[1]) < int(cached[2])
    page.click("[aria-label='Edit question'] >> nth=0")
    page.fill(".editor textarea", "What is 5 + 6?")
    page.keyboard.press("Enter")
    done(page)
    expect(last(page).locator(".markdown").last).to_contain_text("11")
    page.click("[aria-label='Earlier version'] >> nth=0")
    page.click("[aria-label='Earlier version'] >> nth=-1")
    page.reload()
    expect(last(page).locator(".markdown").last).to_have_text(first)


def test_thinking_with_the_server(server_url: str, open_page: Open) -> None:
    page = open_page(server_url)
    page.click("#settings-open")
    page.select_option("[name=think]", "on")
    page.click("dialog .primary")
    ask(page, "What is 7 + 5?")
    expect(last(page).locator("summary")).to_contain_text("Thought")
    expect(last(page).locator(".markdown").last).to_contain_text("12")
    assert "think" not in last(page).locator(".markdown").last.inner_text()


def test_stop_and_refusals_with_the_server(server_url: str, open_page: Open) -> None:
    page = open_page(server_url)
    ask(page, "Hello " * 2000)
    expect(last(page).get_by_role("alert")).to_contain_text(re.compile(r"\d+.*token"))
    page.keyboard.press("Control+k")
    ask(page, "Count from 1 to 20.", wait=False)
    page.keyboard.press("Escape")
    done(page)
    ask(page, "What is 2 + 2?")
    expect(last(page).locator(".markdown").last).to_contain_text("4")


# ---- pictures ----


def draw(url: str) -> None:
    """A conversation on the desktop and on a phone, from the server or its stand-in."""
    with chromium() as browser:
        for name, size, theme in (("page", DESKTOP, "light"), ("page-phone", PHONE, "dark")):
            context = browser.new_context(
                viewport=size, color_scheme=theme, device_scale_factor=2 if size is PHONE else 1,
                has_touch=size is PHONE, is_mobile=size is PHONE,
            )  # fmt: skip
            page = context.new_page()
            page.goto(url)
            ask(page, "Name the capital of France.")
            page.keyboard.press("Control+k")
            page.click("#settings-open")
            page.select_option("[name=think]", "on")
            page.click("dialog .primary")
            ask(page, "What can a prefix cache do?")
            ask(page, "What is 17 + 25?")
            page.locator("[aria-label='Edit question']").last.click()
            page.fill(".editor textarea", "What is 17 + 26?")
            page.click(".editor .primary")
            done(page)
            last(page).locator("summary").click()
            ask(page, "Who are you?")
            page.locator(".user").last.hover()
            path = ROOT / f"docs/{name}.png"
            page.screenshot(path=path)
            context.close()
            print(f"{path.relative_to(ROOT)}: {path.stat().st_size / 1000:.0f} KB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--screenshots", action="store_true", required=True)
    parser.parse_args()
    with real_server() as address:
        draw(address)
