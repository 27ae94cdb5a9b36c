"""The server: who may connect, what it answers, and what it does not let pile up."""

from __future__ import annotations

import asyncio
import gc
import re
import socket
import weakref
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

import numpy as np
import pytest

from starflow.play import Game, Moment, Played, PlayServer, serve
from starflow.sampling import Pipeline
from starflow.worlds import PaddleBall, Step, WorldError

from .visitor import PATIENCE, Visitor, aiohttp, visit


def run(scenario: Callable[[PlayServer], Awaitable[None]], played: Played, **options: object) -> None:
    """Runs a scenario against a server."""

    async def whole() -> None:
        async with PlayServer(played, port=0, **options) as server:  # type: ignore[arg-type]
            await asyncio.wait_for(scenario(server), 3 * PATIENCE)

    asyncio.run(whole())


async def gone(server: PlayServer) -> None:
    """Waits until no tab is open."""
    for _ in range(int(PATIENCE / 0.05)):
        if not server.tabs:
            return
        await asyncio.sleep(0.05)
    pytest.fail(f"{len(server.tabs)} tabs are open")


# -- playing ----------------------------------------------------------------------------------------------------------


def test_a_visitor_is_greeted_and_sees_frames(played: Played) -> None:
    async def scenario(server: PlayServer) -> None:
        async with visit(server) as page:
            hello = await page.next()
            assert hello["type"] == "hello"
            assert hello["model"] == "tiny"
            assert hello["world"] == "paddle"
            assert hello["actions"] == ["stay", "up", "down"]
            assert (hello["height"], hello["width"], hello["channels"]) == (24, 24, 1)
            assert (hello["rows"], hello["columns"]) == (6, 6)
            # 16 values in a place: sqrt(16 / 2) / ln 2.
            assert hello["spread"] == pytest.approx(4.08, abs=0.01)
            assert hello["teleport"]
            assert hello["measures"]
            assert not hello["text"]
            state = await page.next()
            assert state["type"] == "state"
            assert state["playing"]
            first, second = await page.picture(), await page.picture()
            assert first["frame"] == 7
            assert second["frame"] > first["frame"]
            for picture in (first, second):
                assert len(picture["bytes"]["dream"]) == len(picture["bytes"]["real"]) == 24 * 24
            assert len(first["bytes"]["dream_map"]) == 4 * 36
            assert [told["frame"] for told in first["bits"]] == list(range(8))

    run(scenario, played)


def test_a_key_comes_back_with_its_frame(played: Played) -> None:
    async def scenario(server: PlayServer) -> None:
        async with visit(server) as page:
            await page.pause()
            await page.send("act", action=2, key=41)
            await page.send("step")
            picture = await page.until("picture", action=2)
            assert picture["key"] == 41

    run(scenario, played)


def test_of_keys_that_are_faster_than_frames_the_last_one_counts(played: Played) -> None:
    async def scenario(server: PlayServer) -> None:
        async with visit(server) as page:
            await page.pause()
            for key in range(3000):
                await page.send("act", action=key % 3, key=key)
            await page.send("act", action=1, key=3000)
            await page.send("step")
            picture = await page.until("picture", key=3000)
            assert picture["action"] == 1

    run(scenario, played)


def test_commands_that_are_faster_than_their_turn_are_done_once(played: Played) -> None:
    async def scenario(server: PlayServer) -> None:
        async with visit(server) as page:
            await page.pause()
            (tab,) = server.tabs
            last = tab.game.last  # type: ignore[union-attr]
            for seed in range(300):
                await page.send("new", seed=seed)
            await page.until("state", seed=299)
            assert len(tab._commands) <= 1
            assert tab.game.last == 7 <= last  # type: ignore[union-attr]

    run(scenario, played)


def test_a_slow_page_misses_frames_and_nothing_piles_up(played: Played) -> None:
    async def scenario(server: PlayServer) -> None:
        async with visit(server, sees=False) as page:
            await page.send("pace", fps=240)
            (tab,) = server.tabs
            while tab.game is None or tab.game.last < 60:
                await asyncio.sleep(0.05)
            seen: list[dict[str, Any]] = []
            while len(seen) < 3:
                message = await page.next()
                if message["type"] == "picture":
                    seen.append(message)
            # Three are on their way, and the next one is the newest.
            assert [message["number"] for message in seen] == [1, 2, 3]
            last = tab.game.last
            await page.send("seen", number=3)
            newest = await page.picture()
            assert newest["frame"] >= last
            assert len(tab._scores) <= tab._scores.maxlen  # type: ignore[operator]

    run(scenario, played)


def test_where_frames_are_late_each_waits_for_one_score(played: Played, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, int]] = []  # the last moment, and how many were scored
    score = Game.score

    def watched(game: Game, most: int = 99) -> list[Moment]:
        found = score(game, most)
        calls.append((game.last, len(found)))
        return found

    monkeypatch.setattr(Game, "score", watched)

    async def scenario(server: PlayServer) -> None:
        async with visit(server) as page:
            await page.until("state")
            calls.clear()
            await page.send("pace", fps=240)
            (tab,) = server.tabs
            while tab.game is None or tab.game.last < 40:
                await asyncio.sleep(0.02)
            begun = [scored for last, scored in calls if 12 < last < 40]
            assert sum(begun) > 20
            assert max(begun) <= 2

    run(scenario, played)


def test_seek_step_and_branch(played: Played) -> None:
    async def scenario(server: PlayServer) -> None:
        async with visit(server) as page:
            for _ in range(4):
                last = await page.picture()
            await page.send("seek", frame=3)
            picture = await page.until("picture", frame=3)
            assert picture["last"] >= last["frame"]
            await page.send("step")
            picture = await page.until("picture", frame=4)
            assert picture["last"] == 4
            await page.send("play", on=True)
            assert (await page.picture())["frame"] >= 5
            await page.send("seek", frame=10**6)
            error = await page.until("error")
            assert "frame is 1000000, expected 0 to" in error["text"]
            await page.picture()

    run(scenario, played)


def test_settings_come_back(played: Played) -> None:
    async def scenario(server: PlayServer) -> None:
        async with visit(server) as page:
            await page.send("temperature", value=0.5)
            await page.until("state", temperature=0.5)
            await page.send("pace", fps=12)
            await page.until("state", pace=12)
            await page.send("surprise", on=False)
            await page.until("state", surprise=False)
            await page.send("new", seed=9)
            await page.until("state", seed=9)

    run(scenario, played)


def test_a_teleport_is_marked_where_its_surprise_is_told(played: Played) -> None:
    async def scenario(server: PlayServer) -> None:
        async with visit(server) as page:
            await page.picture()
            await page.send("teleport")
            while True:
                message = await page.until("picture")
                edited = [told["frame"] for told in message.get("bits", []) if told["edited"]]
                if edited:
                    break
            (tab,) = server.tabs
            moment = tab.game.moment(edited[0])  # type: ignore[union-attr]
            np.testing.assert_array_equal(moment.dream, moment.real)

    run(scenario, played)


@pytest.mark.parametrize("command", ["teleport", "follow"])
def test_a_past_that_is_shown_can_be_edited(played: Played, command: str) -> None:
    async def scenario(server: PlayServer) -> None:
        async with visit(server) as page:
            for _ in range(4):
                await page.picture()
            await page.pause()
            await page.send("seek", frame=5)
            await page.until("picture", frame=5)
            (tab,) = server.tabs
            assert tab.game is not None
            before = tab.game.moment(5).state.ball
            await page.send(command)
            assert (await page.until("picture", frame=5, last=5))["last"] == 5
            await page.send("step")
            await page.until("picture", frame=6)
            moment = tab.game.moment(6)
            assert (tab.game.last, moment.edited) == (6, True)
            far = max(abs(one - other) for one, other in zip(before, moment.state.ball, strict=True))
            assert (far >= 7) == (command == "teleport")

    run(scenario, played)


def test_a_recording_goes_back_with_the_game(played: Played, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[int] = []

    def write(frames: Any, fps: float) -> bytes:
        written.append(len(frames))
        return b"clip"

    monkeypatch.setattr("starflow.play.tab.write_clip", write)

    async def scenario(server: PlayServer) -> None:
        async with visit(server) as page:
            await page.pause()
            await page.send("surprise", on=False)
            (tab,) = server.tabs
            assert tab.game is not None
            last = tab.game.last
            await page.send("record", on=True)
            await page.until("state", recording=True)
            # Two frames, then one more from three frames before the recording began.
            for number in (last + 1, last + 2):
                await page.send("step")
                await page.until("picture", frame=number)
            await page.send("seek", frame=last - 3)
            await page.until("picture", frame=last - 3)
            await page.send("step")
            await page.until("picture", frame=last - 2)
            await page.send("record", on=False)
            assert (await page.until("clip"))["bytes"]["mp4"] == b"clip"
            # A new game ends a recording, which is of the old one.
            await page.send("record", on=True)
            await page.until("state", recording=True)
            await page.send("step")
            await page.until("picture", frame=last - 1)
            await page.send("new", seed=3)
            assert (await page.until("clip"))["bytes"]["mp4"] == b"clip"
            await page.send("record", on=True)
            await page.until("state", recording=True)
            await page.send("new", seed=4)
            assert "the clip has no frame" in (await page.until("error"))["text"]
            await page.until("state", recording=False, seed=4)

    run(scenario, played)
    assert written == [1, 1]


def test_a_clip_is_sent(played: Played) -> None:
    async def scenario(server: PlayServer) -> None:
        async with visit(server) as page:
            await page.send("record", on=True)
            await page.until("state", recording=True)
            for _ in range(4):
                await page.picture()
            await page.send("record", on=False)
            clip = await page.until("clip")
            assert b"ftyp" in clip["bytes"]["mp4"][:32]
            await page.picture()

    run(scenario, played)


def test_a_clip_that_lost_its_beginning_is_told(played: Played, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("starflow.play.game._MOMENTS", 10)

    async def scenario(server: PlayServer) -> None:
        async with visit(server) as page:
            await page.send("record", on=True)
            await page.until("state", recording=True)
            for _ in range(15):
                await page.picture()
            await page.send("record", on=False)
            said = await page.until("error")
            assert re.fullmatch(
                r"play: the clip begins \d+ frames after the recording did: a game remembers its last 10 frames",
                said["text"],
            )
            assert b"ftyp" in (await page.until("clip"))["bytes"]["mp4"][:32]

    run(scenario, played)


def test_two_pages_do_not_disturb_each_other(played: Played) -> None:
    async def scenario(server: PlayServer) -> None:
        async with visit(server) as one, visit(server) as two:
            await one.pause()
            await two.send("act", action=2, key=1)
            await two.send("new", seed=5)
            await two.until("state", seed=5)
            for _ in range(5):
                picture = await two.picture()
            assert picture["action"] == 2
            await one.send("step")
            picture = await one.until("picture", action=0)
            await one.send("play", on=False)
            state = await one.until("state")
            assert state["seed"] == 0
            assert len(server.tabs) == 2

    run(scenario, played)


def test_pages_take_turns(played: Played) -> None:
    async def scenario(server: PlayServer) -> None:
        async def watch(page: Visitor) -> None:
            while True:
                await page.next()

        async with AsyncExitStack() as stack:
            pages = [await stack.enter_async_context(visit(server)) for _ in range(3)]
            for page in pages:
                await page.send("pace", fps=240)
            watching = [asyncio.create_task(watch(page)) for page in pages]
            games: list[Game] = []
            while len(games) < 3:
                await asyncio.sleep(0.05)
                games = [tab.game for tab in server.tabs if tab.game is not None]
            begun = [game.last for game in games]
            while max(game.last for game in games) < 80:
                await asyncio.sleep(0.05)
            made = [game.last - first for game, first in zip(games, begun, strict=True)]
            assert min(made) > 0.6 * max(made)
            for task in watching:
                task.cancel()
            await asyncio.gather(*watching, return_exceptions=True)

    run(scenario, played)


def test_a_page_that_is_closed_frees_its_game(played: Played, paddle: Pipeline) -> None:
    closed = []

    class Closes(PaddleBall):
        def close(self) -> None:
            closed.append(self)

    async def scenario(server: PlayServer) -> None:
        tried = len(closed)
        async with visit(server) as page:
            await page.picture()
            (tab,) = server.tabs
            held = weakref.ref(tab.game)
            assert held() is not None
            del tab
        await gone(server)
        gc.collect()
        assert held() is None
        assert len(closed) == tried + 1
        # One that leaves without a word.
        async with visit(server) as page:
            await page.picture()
            page.socket._response.connection.transport.abort()
        await gone(server)
        assert len(closed) == tried + 2

    run(scenario, Played(paddle, "tiny", Closes, "paddle"))


# -- what goes wrong --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, told",
    [
        ("nonsense", "play: message is 'nonsense', expected JSON"),
        ('{"type": "act", "action": 3, "key": 1}', r"action is 3, expected an integer from 0 to 2 (stay, up, down)"),
        ('{"type": "read", "path": "/etc/passwd"}', "play: type is 'read', expected one of"),
        ('{"type": "prompt", "text": "a three"}', "the model was trained without text"),
        ('"' + "x" * 5000 + '"', "play: message has 5002 characters, expected at most 4096"),
    ],
)
def test_a_bad_message_gets_an_error_and_the_game_goes_on(played: Played, text: str, told: str) -> None:
    async def scenario(server: PlayServer) -> None:
        async with visit(server) as page:
            await page.picture()
            await page.socket.send_str(text)
            error = await page.until("error")
            assert told in error["text"]
            first = await page.picture()
            assert (await page.picture())["frame"] > first["frame"]

    run(scenario, played)


def test_bytes_are_no_message(played: Played) -> None:
    async def scenario(server: PlayServer) -> None:
        async with visit(server) as page:
            await page.socket.send_bytes(b"{}")
            error = await page.until("error")
            assert "message is binary, expected text that is JSON" in error["text"]
            await page.picture()

    run(scenario, played)


@pytest.mark.parametrize("error", [WorldError("world paddle failed at frame 9: it broke"), KeyError("broke")])
def test_a_world_that_fails_in_the_middle_keeps_the_game(paddle: Pipeline, error: Exception) -> None:
    class Fails(PaddleBall):
        def step(self, action: int) -> Step:
            if action == 2:
                raise error
            return super().step(action)

    async def scenario(server: PlayServer) -> None:
        async with visit(server) as page:
            last = await page.picture()
            await page.send("act", action=2, key=1)
            told = await page.until("error")
            assert "broke" in told["text"]
            await page.until("state", playing=False)
            await page.send("seek", frame=last["frame"])
            assert (await page.until("picture", frame=last["frame"]))["last"] >= last["frame"]
            await page.send("act", action=0, key=2)
            await page.send("play", on=True)
            assert (await page.picture())["frame"] > last["frame"]

    run(scenario, Played(paddle, "tiny", Fails, "paddle"))


def test_a_world_that_does_not_fit_is_told_at_once(paddle: Pipeline) -> None:
    class Two(PaddleBall):
        actions = ("stay", "up")  # type: ignore[assignment]

    async def nothing(server: PlayServer) -> None:
        pytest.fail("the server runs")

    with pytest.raises(ValueError, match="has 2 actions"):
        run(nothing, Played(paddle, "tiny", Two, "two"))


def test_a_port_in_use_is_told(played: Played) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=f"play: port is {port}, which is in use on 127.0.0.1; expected a free one"):
            serve(played, host="127.0.0.1", port=port, announce=lambda url: pytest.fail(url))


def test_an_address_of_another_machine_is_told(played: Played) -> None:
    with pytest.raises(OSError, match=r"play: host is '203\.0\.113\.1', expected an address of this machine"):
        serve(played, host="203.0.113.1", port=0, announce=lambda url: pytest.fail(url))


def test_too_many_pages(played: Played, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("starflow.play.server._TABS", 1)

    async def scenario(server: PlayServer) -> None:
        async with visit(server) as page:
            await page.picture()
            with pytest.raises(aiohttp.WSServerHandshakeError, match="503"):
                async with visit(server):
                    pass

    run(scenario, played)


# -- who may connect --------------------------------------------------------------------------------------------------


async def status(server: PlayServer, path: str, **options: object) -> int:
    """Status of a request, without cookies."""
    address = server.url.partition("?")[0].rstrip("/") + path
    async with (
        aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar()) as session,
        session.get(address, **options) as answer,
    ):
        await answer.read()
        return int(answer.status)


def test_only_its_own_files_are_served(played: Played) -> None:
    async def scenario(server: PlayServer) -> None:
        assert server.url.startswith("http://127.0.0.1:")
        assert "token" not in server.url
        for path in ("/", "/play.js", "/chart.js", "/play.css"):
            assert await status(server, path) == 200
        for path in ("/server.py", "/../server.py", "/%2e%2e/server.py", "/page/index.html", "//etc/passwd"):
            assert await status(server, path) in (400, 404)

    run(scenario, played)


def test_pages_of_other_sites_are_turned_away(played: Played) -> None:
    async def scenario(server: PlayServer) -> None:
        assert await status(server, "/", headers={"Origin": "http://example.org"}) == 403
        # A name of somebody else's that was made to lead here.
        assert await status(server, "/", headers={"Host": "example.org"}) == 403
        assert await status(server, "/", headers={"Host": "example.org:80"}) == 403
        with pytest.raises(aiohttp.WSServerHandshakeError, match="403"):
            async with visit(server, headers={"Origin": "https://example.org"}):
                pass
        port = server.url.rstrip("/").rpartition(":")[2]
        assert await status(server, "/", headers={"Host": f"localhost:{port}"}) == 200

    run(scenario, played)


def test_another_address_asks_for_a_token(played: Played) -> None:
    async def scenario(server: PlayServer) -> None:
        _, _, token = server.url.partition("?token=")
        assert len(token) >= 32
        for path in ("/", "/play.js", "/socket", "/?token=", f"/?token={token[:-1]}", f"/?token={token}x", "/?token=ü"):
            assert await status(server, path) == 403
        assert await status(server, f"/?token={token}") == 200
        async with aiohttp.ClientSession(cookie_jar=aiohttp.CookieJar(unsafe=True)) as session:
            async with session.get(server.url) as answer:
                assert answer.status == 200
                assert "httponly" in answer.headers["Set-Cookie"].lower()
            # The page's own requests have the cookie.
            address = server.url.partition("?")[0]
            async with session.get(address + "play.js") as answer:
                assert answer.status == 200
            async with session.ws_connect(address + "socket") as opened:
                assert (await Visitor(opened).next())["type"] == "hello"

    run(scenario, played, host="0.0.0.0")
