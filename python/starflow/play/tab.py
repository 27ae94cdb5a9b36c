"""Tab: one page that is open, with a game of its own.

Three tasks share a tab: one reads messages, one plays, one sends pictures. Whatever arrives faster than it is needed
replaces what came before it: of actions the last one counts, of pictures the newest is sent. So nothing grows with a
page that sends too much or reads too little.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any

from starflow.messages import short
from starflow.play.game import Game, Moment, write_clip
from starflow.play.protocol import MOST_BYTES, MessageError, pack, read_message

if TYPE_CHECKING:
    from aiohttp.web import WebSocketResponse

logger = logging.getLogger(__name__)

# Runs a function in the thread that computes, when it is this tab's turn.
Compute = Callable[[Callable[[], Any]], Awaitable[Any]]

# Pictures that may be on their way to the page.
_AHEAD = 3
# Scores that are kept for a page that reads too little.
_SCORES = 32


class Tab:
    """Plays a game for one page.

    Args:
        socket: of the page.
        make_game: makes the game, in the thread that computes.
        compute: runs a function there.
        about: what the page is told of the model.
        fps: frames a second to begin with.
    """

    def __init__(
        self,
        socket: WebSocketResponse,
        make_game: Callable[[], Game],
        compute: Compute,
        about: Mapping[str, Any],
        fps: float,
    ) -> None:
        self._socket, self._make_game, self._compute, self._about = socket, make_game, compute, about
        self.game: Game | None = None
        self._playing, self._stepping, self._pace = True, False, fps
        self._action, self._key = 0, 0
        self._surprise, self._cost = True, 0.0
        self._recording: int | None = None
        self._writing: asyncio.Task[None] | None = None
        # The last command of each kind that waits for its turn.
        self._commands: dict[str, dict[str, Any]] = {}
        self._wake = asyncio.Event()
        self._shown: Moment | None = None
        # What the page has not been sent: the newest picture, and scores of moments.
        self._picture: dict[str, Any] | None = None
        self._scores: deque[Moment] = deque(maxlen=_SCORES)
        self._sent = self._seen = 0
        self._send = asyncio.Event()

    async def run(self) -> None:
        """Plays until the page is closed."""
        tasks = [asyncio.create_task(part()) for part in (self._read, self._play, self._show)]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        except ConnectionError:
            pass  # the page was closed while it was written to
        finally:
            tasks += [] if self._writing is None else [self._writing]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._shown = self._picture = None
            self._scores.clear()
            await self._compute(self._free)

    async def close(self) -> None:
        """Closes the connection; `run` then ends."""
        await self._socket.close()

    # -- messages -----------------------------------------------------------------------------------------------------

    async def _read(self) -> None:
        from aiohttp import WSMsgType

        async for message in self._socket:
            try:
                if message.type is not WSMsgType.TEXT:
                    raise MessageError(f"play: message is {message.type.name.lower()}, expected text that is JSON")
                if len(message.data) > MOST_BYTES:
                    raise MessageError(
                        f"play: message has {len(message.data)} characters, expected at most {MOST_BYTES}"
                    )
                self._take(read_message(message.data))
            except MessageError as error:
                # The next message is read when this answer has gone out: answers do not pile up.
                await self._tell(error)

    def _take(self, message: dict[str, Any]) -> None:
        kind = message["type"]
        if kind == "seen":
            self._seen = min(max(self._seen, message["number"]), self._sent)
            self._send.set()
        elif kind == "act":
            actions = self._about["actions"]
            if message["action"] >= max(len(actions), 1):
                raise MessageError(
                    f"play: message act: action is {message['action']}, expected an integer from 0 to "
                    f"{max(len(actions) - 1, 0)} ({', '.join(actions) or 'the model reads none'})"
                )
            if message["action"] != self._action:
                self._wake.set()
            self._action, self._key = message["action"], message["key"]
        else:
            # One of its kind that has not had its turn is replaced.
            self._commands.pop(kind, None)
            self._commands[kind] = message
            self._wake.set()

    @staticmethod
    def _abilities(game: Game) -> dict[str, bool]:
        return {"teleport": game.can_teleport, "measures": game.can_measure}

    async def _tell(self, error: Exception) -> None:
        ours = isinstance(error, ValueError) or type(error).__module__.partition(".")[0] == "starflow"
        text = str(error) if ours else f"{type(error).__name__}: {error}"
        await self._socket.send_json({"type": "error", "text": short(text, 500)})

    async def _tell_state(self, game: Game) -> None:
        await self._socket.send_json(
            {
                "type": "state",
                "playing": self._playing,
                "pace": self._pace,
                "temperature": game.temperature,
                "seed": game.seed,
                "prompt": game.prompt,
                "surprise": self._surprise,
                "recording": self._recording is not None,
                "real": game.has_world,
            }
        )

    # -- the game, in the thread that computes ------------------------------------------------------------------------

    def _make(self) -> Game:
        self.game = self._make_game()
        return self.game

    def _free(self) -> None:
        if self.game is not None:
            self.game.close()
            self.game = None

    # -- the game -----------------------------------------------------------------------------------------------------

    async def _play(self) -> None:
        game: Game = await self._compute(self._make)
        await self._socket.send_json({"type": "hello", **self._about, **self._abilities(game)})
        await self._tell_state(game)
        await self._show_again(game)
        due = time.perf_counter()
        while True:
            await self._wait(due)
            if self._commands:
                await self._obey(game)
                due = max(due, time.perf_counter()) if self._playing else 0.0
            now = time.perf_counter()
            period = 1.0 / self._pace
            # A key pulls the next frame forward. The one after that keeps to its time, so the game is no faster.
            steps = self._stepping or (self._playing and now >= due - period)
            due = max(due + period, now) if steps else due
            try:
                if steps:
                    await self._step(game)
                # A key does not wait for surprise. Where there is never time for it, each frame waits for that of
                # one before it, and none for that of many.
                has_time = not self._wake.is_set() and time.perf_counter() + self._cost < due
                if not self._surprise:
                    game.skip_scores()
                elif game.unscored and not self._playing:
                    await self._score(game, game.unscored)
                elif game.unscored and (has_time or game.unscored > game.scored_together):
                    await self._score(game, game.scored_together)
            # Whatever a world of somebody else's raises: the game so far is kept, and the page may go on.
            except Exception as error:
                logger.warning("play: %s", short(error, 500), exc_info=logger.isEnabledFor(logging.DEBUG))
                self._playing = False
                await self._tell(error)
                await self._tell_state(game)
            finally:
                self._stepping = False

    async def _wait(self, due: float) -> None:
        """Waits until a frame is due or something was done; other tasks have their turn even where frames are late."""
        left = max(due - time.perf_counter(), 0.0) if self._playing else None
        if left == 0.0 or self._commands:
            await asyncio.sleep(0)
        else:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._wake.wait(), left)
        self._wake.clear()

    async def _step(self, game: Game) -> None:
        await self._branch_off(game)
        action, key = self._action, self._key
        begin = time.perf_counter()
        moment = await self._compute(lambda: game.step(action))
        self._offer(game, moment, key=key, seconds=time.perf_counter() - begin)

    async def _branch_off(self, game: Game) -> None:
        """Goes back to the moment that is shown, where it is not the last one; a recording loses what came after it."""
        if self._shown is None or self._shown.number >= game.last:
            return
        number = self._shown.number
        await self._compute(lambda: game.branch(number))
        kept = [moment for moment in self._scores if moment.number <= number]
        self._scores.clear()
        self._scores.extend(kept)
        if self._recording is not None:
            self._recording = min(self._recording, number + 1)
        await self._tell_state(game)

    async def _edit(self, game: Game, edit: Callable[[], None]) -> None:
        """Edits the past that is shown, which becomes the last moment."""
        last = game.last
        await self._branch_off(game)
        if game.last < last:
            # The page learns that nothing comes after it.
            self._offer(game, game.moment(game.last), key=self._key)
        await self._compute(edit)

    async def _score(self, game: Game, most: int) -> None:
        begin = time.perf_counter()
        self._scores.extend(await self._compute(lambda: game.score(most)))
        self._cost = time.perf_counter() - begin
        self._send.set()

    async def _obey(self, game: Game) -> None:
        """Does the commands that wait."""
        while self._commands:
            message = self._commands.pop(next(iter(self._commands)))
            kind = message.pop("type")
            try:
                await getattr(self, f"_on_{kind}")(game, **message)
            except (ValueError, OSError) as error:
                await self._tell(error)
        await self._tell_state(game)

    # -- commands, by the type of their messages ----------------------------------------------------------------------

    async def _on_play(self, game: Game, on: bool) -> None:
        self._playing = on

    async def _on_step(self, game: Game) -> None:
        self._playing, self._stepping = False, True

    async def _on_seek(self, game: Game, frame: int) -> None:
        """Pauses, and shows a moment of the past; the next frame branches off there."""
        moment = game.moment(frame)
        self._playing = False
        if game.unscored and self._surprise:
            await self._score(game, game.unscored)
        self._offer(game, moment, key=self._key)
        self._scores.append(moment)

    async def _on_pace(self, game: Game, fps: float) -> None:
        self._pace = fps

    async def _on_temperature(self, game: Game, value: float) -> None:
        game.temperature = value

    async def _on_new(self, game: Game, seed: int) -> None:
        if self._recording is not None:
            # What was recorded is of the game that ends.
            if self._writing is not None:
                await asyncio.wait([self._writing])
            try:
                await self._on_record(game, on=False)
            except ValueError as error:
                await self._tell(error)
            self._recording = None
        await self._compute(lambda: game.new(seed))
        # What was not sent yet is of the old game.
        self._scores.clear()
        self._shown = self._picture = None
        await self._show_again(game)

    async def _on_teleport(self, game: Game) -> None:
        await self._edit(game, game.teleport)

    async def _on_follow(self, game: Game) -> None:
        await self._edit(game, game.follow)

    async def _on_prompt(self, game: Game, text: str) -> None:
        await self._compute(lambda: game.tell(text))

    async def _on_surprise(self, game: Game, on: bool) -> None:
        self._surprise = on
        if not on:
            game.skip_scores()

    async def _on_record(self, game: Game, on: bool) -> None:
        """Begins to record, or ends that and sends the clip."""
        begin = self._recording
        if not on and begin is not None and self._writing is not None and not self._writing.done():
            raise ValueError("play: a clip is still being written, expected it to be done first (recording goes on)")
        self._recording = game.last + 1 if on else None
        if on or begin is None:
            return
        frames = await self._compute(lambda: game.frames(begin, game.last))
        if (lost := game.first - begin) > 0:
            await self._tell(
                ValueError(
                    f"play: the clip begins {lost} frames after the recording did: a game remembers its last "
                    f"{game.last + 1 - game.first} frames"
                )
            )
        self._writing = asyncio.create_task(self._write(frames))

    async def _write(self, frames: Any) -> None:
        try:
            clip = await asyncio.to_thread(write_clip, frames, self._about["fps"])
        except OSError as error:
            await self._tell(error)
        else:
            await self._socket.send_bytes(pack({"type": "clip"}, {"mp4": clip}))

    # -- pictures -----------------------------------------------------------------------------------------------------

    async def _show_again(self, game: Game) -> None:
        """Shows the last moment, where there is one."""
        if game.last >= 0:
            if self._surprise:
                await self._score(game, game.unscored)
            self._offer(game, game.moment(game.last), key=self._key)

    def _offer(self, game: Game, moment: Moment, *, key: int, seconds: float | None = None) -> None:
        """Shows a moment next; a picture that was not sent yet is dropped."""
        self._shown = moment
        self._picture = {
            "frame": moment.number,
            "first": game.first,
            "last": game.last,
            "action": moment.action,
            "key": key,
            "seconds": seconds,
        }
        self._send.set()

    async def _show(self) -> None:
        """Sends pictures as fast as the page takes them, and surprise as it gets known."""
        while True:
            await self._send.wait()
            self._send.clear()
            while self._sent - self._seen < _AHEAD and (self._picture is not None or self._scores):
                header: dict[str, Any] = {"type": "picture"}
                parts: dict[str, bytes] = {}
                if self._picture is not None and self._shown is not None:
                    header |= self._picture
                    parts["dream"] = self._shown.dream.tobytes()
                    if self._shown.real is not None:
                        parts["real"] = self._shown.real.tobytes()
                    self._picture = None
                if self._scores:
                    header["bits"] = [
                        {
                            "frame": moment.number,
                            "dream": moment.dream_score and moment.dream_score.bits,
                            "real": moment.real_score and moment.real_score.bits,
                            "edited": moment.edited,
                        }
                        for moment in self._scores
                    ]
                    newest = self._scores[-1]
                    for name, score in (("dream_map", newest.dream_score), ("real_map", newest.real_score)):
                        if score is not None:
                            parts[name] = score.tokens.tobytes()
                    self._scores.clear()
                self._sent += 1
                await self._socket.send_bytes(pack({**header, "number": self._sent}, parts))
