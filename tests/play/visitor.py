"""A page without a browser: connects, sends messages and reads what comes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from starflow.play import PlayServer
from starflow.play.protocol import unpack

aiohttp: Any = pytest.importorskip("aiohttp", reason="aiohttp (the extra play) is not installed")

# Longest time that anything takes on a busy machine, in seconds.
PATIENCE = 60.0


class Visitor:
    """One socket.

    Args:
        socket: of aiohttp's client.
        sees: whether it tells the server of every picture that it has seen it.
    """

    def __init__(self, socket: Any, *, sees: bool = True) -> None:
        self.socket, self.sees = socket, sees

    async def send(self, kind: str, **fields: Any) -> None:
        await self.socket.send_str(json.dumps({"type": kind, **fields}))

    async def next(self) -> dict[str, Any]:
        """The next message: JSON, or the header of a binary message with its `bytes` by name."""
        message = await asyncio.wait_for(self.socket.receive(), PATIENCE)
        if message.type is aiohttp.WSMsgType.TEXT:
            told: dict[str, Any] = json.loads(message.data)
            return told
        assert message.type is aiohttp.WSMsgType.BINARY, message
        header, parts = unpack(message.data)
        if self.sees and header["type"] == "picture":
            await self.send("seen", number=header["number"])
        return {**header, "bytes": parts}

    async def until(self, kind: str, **fields: Any) -> dict[str, Any]:
        """The next message of a type that has these fields; others are dropped."""
        while True:
            message = await self.next()
            if message["type"] == kind and all(name in message and message[name] == fields[name] for name in fields):
                return message

    async def picture(self) -> dict[str, Any]:
        """The next message with a picture, not with surprise alone."""
        while True:
            message = await self.until("picture")
            if "frame" in message:
                return message

    async def pause(self) -> None:
        await self.send("play", on=False)
        await self.until("state", playing=False)


@asynccontextmanager
async def visit(server: PlayServer, *, sees: bool = True, **options: Any) -> AsyncIterator[Visitor]:
    """Opens a socket at a server; the greeting has been read."""
    async with aiohttp.ClientSession() as session:
        address = server.url.partition("?")[0] + "socket"
        async with session.ws_connect(address, max_msg_size=0, **options) as socket:
            yield Visitor(socket, sees=sees)
