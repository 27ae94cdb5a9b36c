"""PlayServer: serves the page, and a tab for each that is open, from one process."""

from __future__ import annotations

import asyncio
import errno
import hmac
import math
import secrets
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from starflow.arguments import check_call
from starflow.extras import import_extra
from starflow.play.game import Game
from starflow.play.protocol import MOST_BYTES
from starflow.play.tab import Tab
from starflow.sampling import Pipeline
from starflow.worlds import PlayableWorld

if TYPE_CHECKING:
    from aiohttp.web import AppRunner, Request, Response, WebSocketResponse

# The page: these files, and no others.
_PAGE = Path(__file__).parent / "page"
_FILES = {
    "/": ("index.html", "text/html"),
    "/play.js": ("play.js", "text/javascript"),
    "/chart.js": ("chart.js", "text/javascript"),
    "/play.css": ("play.css", "text/css"),
}
# Tabs that are open at most: each has a cache of the model's.
_TABS = 16
_HEADERS = {
    # Nothing from elsewhere, and in no frame of another page.
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


@dataclass(frozen=True)
class Played:
    """What is played.

    Args:
        pipeline: the model.
        name: of the model, for the page.
        make_world: opens the real world beside a dream; None for none.
        world: its name.
    """

    pipeline: Pipeline
    name: str
    make_world: Callable[[], PlayableWorld] | None = None
    world: str = ""


class PlayServer:
    """Serves the page on which a model is played.

    On this machine's own address nobody else can connect, and pages of other sites are turned away by their origin.
    On any other address a visitor needs the token that is part of `url`.

    Args:
        played: the model and its world.
        host: address to listen on.
        port: of it; 0 takes a free one.

    Raises:
        ImportError: aiohttp is not installed.

    Example:
        >>> async with PlayServer(Played(pipeline, "paddle")) as server:  # doctest: +SKIP
        ...     print(server.url)
        ...     await asyncio.Event().wait()
    """

    def __init__(self, played: Played, *, host: str = "127.0.0.1", port: int = 8765) -> None:
        self._web: Any = import_extra("aiohttp.web", purpose="starflow play", extra="play")
        self._played, self._host, self._port = played, host, port
        self._token = None if _is_own(host) else secrets.token_urlsafe(24)
        self.tabs: set[Tab] = set()
        self._actions: tuple[str, ...] = ()
        self._runner: AppRunner | None = None
        # One thread computes for all tabs. A tab asks for one thing at a time, and turns come in the order of asking.
        self._thread: ThreadPoolExecutor | None = None

    @property
    def url(self) -> str:
        """Address of the page, with the token where it asks for one."""
        name = "127.0.0.1" if self._host in ("0.0.0.0", "::") else self._host
        name = f"[{name}]" if ":" in name else name
        return f"http://{name}:{self._port}/" + (f"?token={self._token}" if self._token else "")

    async def __aenter__(self) -> PlayServer:
        web = self._web

        @web.middleware  # type: ignore[untyped-decorator]
        async def guard(request: Request, handler: Callable[[Request], Any]) -> Any:
            return await self._guard(request, handler)

        app = web.Application(middlewares=[guard])
        app.add_routes([web.get("/socket", self._socket), *(web.get(path, self._file) for path in _FILES)])
        self._thread = ThreadPoolExecutor(
            1,
            thread_name_prefix="starflow-play",
            initializer=torch.set_num_threads,
            initargs=(torch.get_num_threads(),),
        )
        try:
            self._actions = await self._compute(self._try)
            self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=2.0)
            await self._runner.setup()
            await web.TCPSite(self._runner, self._host, self._port).start()
        except OSError as error:
            await self.__aexit__()
            if error.errno == errno.EADDRINUSE:
                raise OSError(
                    f"play: port is {self._port}, which is in use on {self._host}; expected a free one (0 takes any)"
                ) from None
            raise OSError(f"play: host is {self._host!r}, expected an address of this machine: {error}") from None
        except BaseException:
            await self.__aexit__()
            raise
        self._port = self._runner.addresses[0][1]
        return self

    async def __aexit__(self, *_: object) -> None:
        for tab in list(self.tabs):
            await tab.close()
        if self._runner is not None:
            await self._runner.cleanup()
        if self._thread is not None:
            self._thread.shutdown(wait=False, cancel_futures=True)

    def _try(self) -> tuple[str, ...]:
        """Plays two frames, so that what does not fit fails now and no page waits for it; returns the actions."""
        game = Game(self._played.pipeline, self._played.make_world)
        for _ in range(2):
            game.step()
        game.score()
        game.close()
        return game.actions

    # -- requests -----------------------------------------------------------------------------------------------------

    async def _guard(self, request: Request, handler: Callable[[Request], Any]) -> Any:
        """Turns away whoever may not connect."""
        if not self._may(request):
            raise self._web.HTTPForbidden(
                text="starflow play: this address needs the link, token included, that the command printed\n"
                if self._token
                else "starflow play: this page is for this machine alone\n"
            )
        answer = await handler(request)
        if not answer.prepared:
            answer.headers.update(_HEADERS)
            if self._token:
                # So that the page's own files come without the token in their addresses.
                answer.set_cookie(self._cookie, self._token, httponly=True, samesite="Strict")
        return answer

    @property
    def _cookie(self) -> str:
        # Cookies do not tell ports apart.
        return f"starflow-play-{self._port}"

    def _may(self, request: Request) -> bool:
        origin = request.headers.get("Origin")
        if origin is not None and origin.partition("://")[2] != request.host:
            return False  # a page of another site
        if self._token is None:
            # A name of somebody else's that leads to this machine is not ours.
            name = request.host.rpartition(":")[0] or request.host
            return _is_own(name.strip("[]"))
        given = request.query.get("token") or request.cookies.get(self._cookie) or ""
        return hmac.compare_digest(given.encode(), self._token.encode())

    async def _file(self, request: Request) -> Response:
        name, kind = _FILES[request.path]
        answer: Response = self._web.Response(body=(_PAGE / name).read_bytes(), content_type=kind, charset="utf-8")
        return answer

    async def _socket(self, request: Request) -> WebSocketResponse:
        if len(self.tabs) >= _TABS:
            raise self._web.HTTPServiceUnavailable(text=f"starflow play: {_TABS} pages are open, expected fewer\n")
        socket: WebSocketResponse = self._web.WebSocketResponse(
            heartbeat=20.0, max_msg_size=16 * MOST_BYTES, compress=False
        )
        await socket.prepare(request)
        played = self._played

        def make_game() -> Game:
            return Game(played.pipeline, played.make_world)

        tab = Tab(socket, make_game, self._compute, self._about(), played.pipeline.config.sample.fps)
        self.tabs.add(tab)
        try:
            await tab.run()
        finally:
            self.tabs.discard(tab)
        return socket

    async def _compute(self, function: Callable[[], Any]) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function)

    def _about(self) -> dict[str, Any]:
        """What the page is told of the model."""
        pipeline, config = self._played.pipeline, self._played.pipeline.config
        spatial, patch = pipeline.codec.spatial, config.flow.patch_size
        values = config.flow.in_channels * patch**2
        return {
            "model": self._played.name,
            "world": self._played.world,
            "actions": self._actions,
            "text": pipeline.text is not None,
            "height": config.data.height,
            "width": config.data.width,
            "channels": pipeline.codec.channels,
            "rows": config.data.height // (spatial * patch),
            "columns": config.data.width // (spatial * patch),
            # Standard deviation of the bits of a place under one draw of the noise (see `starflow.evaluate.surprise`).
            "spread": math.sqrt(values / 2) / math.log(2),
            "fps": config.sample.fps,
        }


def _is_own(host: str) -> bool:
    """Whether an address leads to this machine from itself alone."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def serve(played: Played, *, host: str, port: int, announce: Callable[[str], None]) -> None:
    """Serves the page until the process is interrupted.

    Args:
        played, host, port: as of `PlayServer`.
        announce: is called with the page's address, as soon as it can be opened.

    Raises:
        OSError: the port is in use, or the address is not this machine's.
        ValueError: the world does not fit the model.
    """
    check_call("serve", "announce", announce, optional=False)

    async def run() -> None:
        async with PlayServer(played, host=host, port=port) as server:
            announce(server.url)
            await asyncio.Event().wait()

    asyncio.run(run())
