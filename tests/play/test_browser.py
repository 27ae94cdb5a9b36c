"""The page in a real browser: keys are pressed, frames counted, and the page's own figures read."""

from __future__ import annotations

import asyncio
import gc
import shutil
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest

from starflow.play import Game, Played, PlayServer
from starflow.sampling import Pipeline

pytest.importorskip("aiohttp", reason="aiohttp (the extra play) is not installed")
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright (the extra test) is not installed")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")

# Longest time that anything takes on a busy machine, in seconds.
PATIENCE = 60.0


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@contextmanager
def running(played: Played) -> Iterator[PlayServer]:
    """A server in a thread of its own, as in a process of its own."""
    ready: list[PlayServer] = []
    loop = asyncio.new_event_loop()
    stop = asyncio.Event()

    async def whole() -> None:
        async with PlayServer(played, port=0) as server:
            ready.append(server)
            await stop.wait()

    thread = threading.Thread(target=lambda: loop.run_until_complete(whole()))
    thread.start()
    try:
        wait(lambda: bool(ready) or not thread.is_alive())
        yield ready[0]
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(PATIENCE)
        loop.close()


def wait(what: Callable[[], Any], *, told: Callable[[], Any] = lambda: "") -> None:
    """Waits until something holds."""
    end = time.monotonic() + PATIENCE
    while not what():
        if time.monotonic() > end:
            pytest.fail(f"waited for {PATIENCE:g} s: {told()}")
        time.sleep(0.02)


def acted(game: Game | None, action: int) -> bool:
    """Whether the last frame of a game followed an action."""
    assert game is not None
    return game.moment(game.last).action == action


def counts_more(least: int, stats: dict[str, Any]) -> bool:
    """Whether the page has timed more keys than that."""
    return bool(stats["keyToFrame"]["count"] > least)


class Page:
    """A tab, and what it says of itself."""

    def __init__(self, browser: Any, url: str, **options: Any) -> None:
        # A context of its own, as of another visitor.
        self.context = browser.new_context(accept_downloads=True, **options)
        self.page = self.context.new_page()
        self.faults: list[str] = []
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.on("console", lambda line: self.faults.append(line.text) if line.type == "error" else None)
        self.page.goto(url)
        self.until(lambda stats: stats["frames"] >= 3)

    @property
    def stats(self) -> dict[str, Any]:
        told: dict[str, Any] = self.page.evaluate("starflowStats")
        return told

    def until(self, holds: Callable[[dict[str, Any]], Any]) -> None:
        wait(lambda: holds(self.stats), told=lambda: (self.stats, self.faults))

    def press(self, key: str, seconds: float = 0.0) -> None:
        self.page.keyboard.down(key)
        time.sleep(seconds)
        self.page.keyboard.up(key)

    def pause(self) -> None:
        self.press("p")
        self.until(lambda stats: not stats["playing"])

    def text(self, selector: str) -> str:
        return str(self.page.inner_text(selector))

    def close(self) -> None:
        self.context.close()


@contextmanager
def opened(browser: Any, url: str, **options: Any) -> Iterator[Page]:
    page = Page(browser, url, **options)
    try:
        yield page
    finally:
        page.close()


def test_keys_move_the_paddle_and_their_time_is_told(browser: Any, played: Played) -> None:
    with running(played) as server, opened(browser, server.url) as page:
        (tab,) = server.tabs
        game = tab.game
        assert game is not None
        for key, action in (("ArrowUp", 1), ("s", 2), ("w", 1), ("ArrowDown", 2), ("3", 2)):
            counted = page.stats["keyToFrame"]["count"]
            page.page.keyboard.down(key)
            wait(partial(acted, game, action))
            page.until(partial(counts_more, counted))
            page.page.keyboard.up(key)
            wait(partial(acted, game, 0))
        stats = page.stats
        assert stats["fps"] > 0
        assert 0 < stats["keyToFrame"]["median"] <= stats["keyToFrame"]["p95"]
        assert stats["bits"]["dream"] is not None
        assert stats["bits"]["real"] is not None
        wait(lambda: "ms" in page.text("#latency") and "ms" in page.text("#made") and page.text("#fps").isdecimal())
        assert page.stats["errors"] == []
        assert page.faults == []


def test_the_page_can_be_played_by_keyboard_alone(browser: Any, played: Played) -> None:
    with running(played) as server, opened(browser, server.url) as page:
        page.pause()
        frame = page.stats["frame"]
        page.press(".")
        page.until(lambda stats: stats["frame"] == frame + 1)
        page.press(",")
        page.until(lambda stats: stats["frame"] == frame)
        page.press(",")
        page.until(lambda stats: stats["frame"] == frame - 1)
        # Another future begins where one went back to.
        page.press(" ")
        page.until(lambda stats: stats["playing"] and stats["frame"] > frame)
        page.press("n")
        page.until(lambda stats: page.page.input_value("#seed") == "1")
        page.press("t")
        (tab,) = server.tabs
        game = tab.game
        assert game is not None
        wait(lambda: any(game.moment(number).edited for number in range(game.first, game.last + 1)))
        # Every control can be reached, and says what it is.
        page.pause()
        names = []
        page.page.keyboard.press("Escape")
        for _ in range(30):
            page.page.keyboard.press("Tab")
            names.append(page.page.evaluate("document.activeElement.id"))
        wanted = "timeline back play step teleport follow record new temperature pace seed"
        assert set(wanted.split()) <= set(names)
        assert page.faults == []


def test_the_timeline_seeks(browser: Any, played: Played) -> None:
    with running(played) as server, opened(browser, server.url) as page:
        page.until(lambda stats: stats["frame"] >= 12)
        page.page.evaluate("""() => {
            const slider = document.querySelector("#timeline");
            slider.value = 5;
            slider.dispatchEvent(new Event("input"));
        }""")
        page.until(lambda stats: stats["frame"] == 5 and not stats["playing"])
        # The numbers follow the picture.
        wait(lambda: " of " in page.page.evaluate("document.querySelector('#frame').value"))


def test_a_clip_can_be_kept(browser: Any, played: Played) -> None:
    with running(played) as server, opened(browser, server.url) as page:
        frame = page.stats["frame"]
        page.press("r")
        page.until(lambda stats: stats["frame"] >= frame + 4)
        with page.page.expect_download(timeout=1000 * PATIENCE) as download:
            page.press("r")
        assert download.value.suggested_filename == "tiny.mp4"
        with open(download.value.path(), "rb") as file:
            assert b"ftyp" in file.read(32)


def test_touch_plays_on_a_phone(browser: Any, played: Played) -> None:
    phone = {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True}
    with running(played) as server, opened(browser, server.url, **phone) as page:
        (tab,) = server.tabs
        game = tab.game
        assert game is not None
        up = page.page.get_by_role("button", name="up", exact=True)
        assert up.is_visible()
        up.dispatch_event("pointerdown", {"pointerId": 1, "pointerType": "touch"})
        wait(partial(acted, game, 1))
        up.dispatch_event("pointerup", {"pointerId": 1, "pointerType": "touch"})
        wait(partial(acted, game, 0))
        # Nothing is wider than the screen.
        assert page.page.evaluate("document.documentElement.scrollWidth") <= 360


def test_both_schemes_are_readable(browser: Any, played: Played) -> None:
    """Text stands out from its ground by the ratio of WCAG (level AA)."""
    with running(played) as server:
        for scheme in ("light", "dark"):
            with opened(browser, server.url, color_scheme=scheme) as page:
                style = "name => getComputedStyle(document.documentElement).getPropertyValue('--' + name)"
                for pair in ("ink card", "soft card", "soft ground", "dream card", "real card", "alarm card"):
                    lights = sorted(luminance(page.page.evaluate(style, name)) for name in pair.split())
                    assert (lights[1] + 0.05) / (lights[0] + 0.05) >= 4.5, (scheme, pair)


def luminance(colour: str) -> float:
    """Relative luminance of "#rrggbb"."""
    levels = [int(colour.strip()[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [level / 12.92 if level <= 0.04045 else ((level + 0.055) / 1.055) ** 2.4 for level in levels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_two_tabs_do_not_disturb_each_other_and_a_closed_one_is_freed(browser: Any, played: Played) -> None:
    with running(played) as server, opened(browser, server.url) as one:
        (first,) = server.tabs
        with opened(browser, server.url) as two:
            (second,) = server.tabs - {first}
            assert first.game is not None
            assert second.game is not None
            held, still = weakref.ref(second.game), first.game
            one.pause()
            two.press("n")
            two.until(lambda stats: two.page.input_value("#seed") == "1")
            two.page.keyboard.down("ArrowUp")
            wait(lambda: acted(held(), 1))
            assert one.page.input_value("#seed") == "0"
            frame = one.stats["frame"]
            begun = two.stats["frames"]
            two.until(lambda stats: stats["frames"] >= begun + 5)
            assert one.stats["frame"] == frame
            one.press(".")
            wait(lambda: still.last == frame + 1)
            assert acted(still, 0)
            del second
        wait(lambda: server.tabs == {first})
        gc.collect()
        wait(lambda: held() is None)
        one.press("p")
        one.until(lambda stats: stats["playing"] and stats["frame"] > frame + 1)


def test_an_error_is_shown_and_the_game_goes_on(browser: Any, pipeline: Pipeline) -> None:
    with running(Played(pipeline, "tiny")) as server, opened(browser, server.url) as page:
        page.page.fill("#prompt", "a three moving sideways and twice")
        page.page.press("#prompt", "Enter")
        page.until(lambda stats: stats["errors"])
        assert page.page.is_visible("#message")
        assert "prompt" in page.text("#message")
        frames = page.stats["frames"]
        page.until(lambda stats: stats["frames"] >= frames + 3)


def test_a_prompt_changes_what_happens_next(browser: Any, pipeline: Pipeline) -> None:
    with running(Played(pipeline, "tiny")) as server, opened(browser, server.url) as page:
        assert not page.page.is_visible("#teleport")
        assert not page.page.is_visible("#real")
        page.page.click("#prompt")
        # Letters are text here, not keys of the game.
        page.page.keyboard.type("a three moving up")
        page.page.keyboard.press("Enter")
        (tab,) = server.tabs
        wait(lambda: tab.game is not None and tab.game.prompt == "a three moving up")
        frames = page.stats["frames"]
        page.until(lambda stats: stats["frames"] >= frames + 3)
        assert page.stats["playing"]
        page.page.fill("#prompt", "an eight standing still")
        page.page.click("#begin")
        page.until(lambda stats: page.page.input_value("#seed") == "1")
        assert tab.game is not None
        assert tab.game.prompt == "an eight standing still"
        assert page.stats["errors"] == []


def test_a_server_that_ends_is_told(browser: Any, played: Played) -> None:
    with running(played) as server:
        page = Page(browser, server.url)
    wait(lambda: page.page.is_visible("#message"))
    assert "The connection has ended" in page.text("#message")
    page.close()
