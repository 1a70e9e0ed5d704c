"""The page of a real service in a real browser, without a screen."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.serving import KEYS, Served, finished, http, make, serving

pytest.importorskip("uvicorn", reason="the service extra is not installed")
playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
PROMPT = "a red circle moving right"
PATIENCE_MS = 60_000


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium."""
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is installed")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def served(tiny_engines: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tiny_engines, tmp_path_factory.mktemp("page") / "data", slots=1) as running:
        yield running


@pytest.fixture
def page(browser: Any, served: Served) -> Iterator[Any]:
    """The page in a window of its own; what it made is gone afterwards, and the console stayed empty."""
    yield from window(browser, served.url)
    with http(served) as client:
        for video in client.get("/v1/videos", params={"limit": 100}).json()["data"]:
            client.delete(f"/v1/videos/{video['id']}")


def window(browser: Any, url: str, excused: str | None = None, **options: Any) -> Iterator[Any]:
    context = browser.new_context(**options)
    page = context.new_page()
    page.set_default_timeout(PATIENCE_MS)
    said: list[str] = []
    page.on("console", lambda message: said.append(f"{message.text} {message.location['url']}"))
    page.on("pageerror", lambda error: said.append(str(error)))
    outside: list[str] = []
    page.on("request", lambda request: outside.append(request.url))
    page.goto(url)
    page.wait_for_selector("#solver option, #key-box[open]", state="attached")
    yield page
    assert [each for each in said if excused is None or excused not in each] == []
    assert [each for each in outside if not each.startswith((url, "blob:", "data:"))] == []
    context.close()


def until(page: Any, condition: str) -> None:
    """Wait for a condition; Playwright's own way to needs what the page's policy forbids."""
    ends = time.monotonic() + PATIENCE_MS / 1000
    while not page.evaluate(condition):
        assert time.monotonic() < ends, condition
        page.wait_for_timeout(50)


def ask(page: Any, prompt: str, steps: int = 2, frames: int = 2) -> None:
    page.fill("#prompt", prompt)
    page.fill("#frames", str(frames))
    page.evaluate(
        "steps => { const box = document.querySelector('#steps'); box.value = steps;"
        " box.dispatchEvent(new Event('input', { bubbles: true })); }",
        steps,
    )
    page.keyboard.press("Control+Enter")


def test_a_video_is_asked_for_followed_and_played(page: Any) -> None:
    assert page.is_visible("#empty")
    ask(page, PROMPT, steps=40, frames=8)
    page.wait_for_selector("#stage .bar")
    page.wait_for_selector("#stage .screen img[src^='data:image/jpeg']")
    page.wait_for_selector("#stage video")
    until(page, "document.querySelector('#stage video').readyState >= 2")
    assert page.evaluate("document.querySelector('#stage video').videoWidth") > 0
    assert page.text_content("#stage .says") == PROMPT
    assert "Made in" in page.text_content("#stage .state")
    assert page.locator(".card").count() == 1
    with page.expect_download() as download:
        page.click("#stage a[download]")
    assert download.value.suggested_filename.endswith(".mp4")


def test_a_running_video_is_cancelled(page: Any) -> None:
    ask(page, "never done", steps=100, frames=16)
    page.wait_for_selector("#stage .bar")
    page.click("#stage menu button:has-text('Cancel')")
    page.wait_for_selector("#empty", state="visible")
    assert page.locator(".card").count() == 0


def test_a_finished_video_is_remixed_and_deleted(page: Any) -> None:
    ask(page, PROMPT, steps=8)
    page.wait_for_selector("#stage video")
    page.click("#stage menu button:has-text('Remix')")
    assert page.is_visible("#strength-field")
    assert not page.is_visible("#shape")
    page.fill("#prompt", "a blue circle")
    page.click("#go")
    until(page, "document.querySelectorAll('.card').length === 2")
    until(page, "document.querySelector('#stage .says').textContent === 'a blue circle'")
    page.wait_for_selector("#stage video")
    page.click("#stage menu button:has-text('Delete')")
    page.click("#sure-box button:has-text('Keep it')")
    assert page.locator(".card").count() == 2
    page.click("#stage menu button:has-text('Delete')")
    page.click("#sure-box button.danger")
    until(page, "document.querySelectorAll('.card').length === 1")
    assert page.text_content("#stage .says") == PROMPT


def test_the_keyboard_does_it_all(page: Any) -> None:
    for prompt in ("first", "second"):
        ask(page, prompt)
        until(page, f"document.querySelector('#stage .says')?.textContent === '{prompt}'")
        page.wait_for_selector("#stage video")
    page.keyboard.press("Escape")
    page.keyboard.press("ArrowRight")
    assert page.text_content("#stage .says") == "first"
    page.keyboard.press("u")
    assert page.input_value("#prompt") == "first"
    page.keyboard.press("Escape")
    page.keyboard.press("r")
    assert page.is_visible("#source")
    page.keyboard.press("Escape")
    assert not page.is_visible("#source")
    page.keyboard.press("?")
    assert page.is_visible("#help-box")
    page.keyboard.press("Escape")
    page.keyboard.press("Delete")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    until(page, "document.querySelectorAll('.card').length === 1")
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "prompt"


def test_what_is_wrong_is_said_beside_the_form(page: Any) -> None:
    page.click("#go")
    assert "Say what" in page.text_content("#trouble")
    page.fill("#prompt", PROMPT)
    page.fill("#width", "100000")
    page.click("#go")
    assert page.text_content("#trouble").startswith("Width:")


def test_markup_in_a_prompt_stays_text(page: Any, served: Served) -> None:
    with http(served) as client:
        make(client, "<img src=x onerror=document.title='bad'><script>document.title='bad'</script>")
    page.reload()
    page.wait_for_selector(".card")
    assert "<script>" in page.text_content(".card .says")
    assert page.title() == "ReelRT"


def test_older_videos_are_shown_though_the_last_one_was_deleted_elsewhere(
    browser: Any, served: Served, page: Any
) -> None:
    with http(served) as client:
        first = finished(client, make(client, PROMPT, seed=3))
        made = [first, *(make(client, PROMPT, seed=3) for _ in range(29))]  # all have the first one's result
        gone = made[-24]["id"]
        for other in window(browser, served.url, excused=gone):  # Chromium notes each 404
            until(other, "document.querySelectorAll('.card').length === 24")
            client.delete(f"/v1/videos/{gone}")
            other.click("#more")
            until(other, "document.querySelectorAll('.card').length === 29")
            assert other.locator("#trouble").is_hidden()
            assert other.locator("#more").is_hidden()


def test_light_dark_and_the_width_of_a_phone(browser: Any, served: Served, page: Any) -> None:
    ask(page, PROMPT)
    page.wait_for_selector("#stage video")
    colours = set()
    for scheme in ("light", "dark"):
        for other in window(browser, served.url, color_scheme=scheme):
            colours.add(other.evaluate("getComputedStyle(document.body).backgroundColor"))
            other.click("#theme")
            assert other.evaluate("document.documentElement.dataset.theme") == "light"
            other.click("#theme")
            assert other.evaluate("document.documentElement.dataset.theme") == "dark"
    assert len(colours) == 2
    phone: dict[str, Any] = {"viewport": {"width": 360, "height": 740}, "is_mobile": True, "has_touch": True}
    for other in window(browser, served.url, **phone):
        other.wait_for_selector(".card")
        assert other.evaluate("document.documentElement.scrollWidth") == 360
        small = other.evaluate(
            "[...document.querySelectorAll('button')].filter("
            "each => each.offsetWidth && each.offsetHeight < 32).length"
        )
        assert small == 0, "a finger needs room"
        assert not other.is_visible("#steps")


def test_a_service_with_a_key_asks_for_it(browser: Any, tiny_engines: Path, tmp_path: Path) -> None:
    with serving(tiny_engines, tmp_path / "data", api_keys=KEYS[0]) as served:
        for page in window(browser, served.url, excused="status of 401"):  # Chromium notes each
            page.fill("#key-text", "not the key at all")
            with page.expect_response("**/v1/models"):
                page.keyboard.press("Enter")
            until(
                page, "document.querySelector('#key-box').open && !document.querySelector('#key-text').value"
            )
            page.fill("#key-text", KEYS[0])
            page.keyboard.press("Enter")
            page.wait_for_selector("#solver option", state="attached")
            ask(page, PROMPT)
            page.wait_for_selector("#stage video[src^='blob:']")
            until(page, "document.querySelector('#stage video').readyState >= 2")
