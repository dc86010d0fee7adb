"""Browsers over a small HTTP client, and their requests to the applications of `web_apps`."""

import asyncio
import itertools
import re
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Final, NamedTuple

from .drivers import Operations, Way
from .web_apps import ALONE, APPS, served

_LENGTH: Final = re.compile(rb"content-length: (\d+)", re.IGNORECASE)
_COOKIE: Final = re.compile(rb"set-cookie: session=([^;\r]*)([^\r]*)", re.IGNORECASE)
_DELETED: Final = re.compile(rb"max-age=0\b|1970", re.IGNORECASE)

UNTOUCHED: Final = "untouched"
READ: Final = "read"
CHANGED: Final = "changed"
SIGNED_IN: Final = "signed in"
"""The user was another user before, so that the id changes."""
BOT: Final = "read, no cookie"
KINDS: Final = (UNTOUCHED, READ, CHANGED, SIGNED_IN)


class Reply(NamedTuple):
    """The status and the body of a response."""

    status: int
    body: bytes


class Client:
    """Connections to one application. A request takes an idle one, or opens another."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def get(self, path: str, cookie: bytes) -> tuple[bytes, bytes]:
        """Make a request, and return the head and the body of the response."""
        if self._idle:
            reader, writer = self._idle.pop()
        else:
            reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        line = b"Cookie: session=%s\r\n" % cookie if cookie else b""
        writer.write(b"GET /%s HTTP/1.1\r\nHost: localhost\r\n%s\r\n" % (path.encode(), line))
        head = await reader.readuntil(b"\r\n\r\n")
        found = _LENGTH.search(head)
        body = await reader.readexactly(int(found[1]) if found else 0)
        self._idle.append((reader, writer))
        return head, body

    def close(self) -> None:
        """Close the connections."""
        for _, writer in self._idle:
            writer.close()


class Browser:
    """A browser with the cookie of its session. Requests may overlap; the last cookie stays."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._cookie = b""

    async def get(self, path: str) -> Reply:
        """Make a request, and keep the cookie of the response."""
        head, body = await self._client.get(path, self._cookie)
        if found := _COOKIE.search(head):
            self._cookie = b"" if _DELETED.search(found[2]) else found[1]
        return Reply(int(head[9:12]), body)


@asynccontextmanager
async def _connect(name: str, url: str) -> AsyncIterator[Client]:
    with served(name, url) as port:
        client = Client(port)
        yield client
        client.close()


def _operations(client: Client) -> Operations:
    browsers: dict[str, Browser] = {}
    # Each user signs in once, so that no user has many sessions.
    users = itertools.count(secrets.randbits(48))

    async def ask(browser: Browser, path: str) -> None:
        status = (await browser.get(path)).status
        if status != 200:
            raise RuntimeError(f"a request was answered with {status}")

    async def prepare(id: str) -> None:
        browsers[id] = Browser(client)
        await ask(browsers[id], "change")
        await sign_in(id)

    async def sign_in(id: str) -> None:
        await ask(browsers[id], f"sign-in?value={next(users)}")

    return {
        "prepare": prepare,
        UNTOUCHED: lambda id: ask(browsers[id], "untouched"),
        READ: lambda id: ask(browsers[id], "read"),
        CHANGED: lambda id: ask(browsers[id], "change"),
        SIGNED_IN: sign_in,
        BOT: lambda _: ask(Browser(client), "read"),
    }


WEB: Final = {name: Way(partial(_connect, name), _operations) for name in (*ALONE, *APPS)}
"""The applications, each served for as long as its client is open."""
