"""An MCP proxy for streamable HTTP that runs as any number of replicas.

- A client knows the proxy's session id only. The backend's URL and session id are the `data` of
  that session, which all replicas share.
- Each replica has a copy of the sessions in use, so most requests cost nothing in the store. It
  hears at once if another replica changes or deletes one.
- Each replica has connections of its own for each session in use, and closes them when the session
  ends. The end of a session ends its open calls and event streams on every replica.
- Response bodies pass through as they arrive. When the client disconnects, the proxy closes the
  backend's stream.
- A session that does not exist is 404, and an MCP client then opens a new one. A store that does
  not answer is 503, because the session may still exist.
"""

import argparse
import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial

import anyio
import httpx
import msgspec
from serve import serve
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from aiosessions import (
    InvalidSessionId,
    JsonCodec,
    NearCache,
    RedisStorage,
    Session,
    SessionError,
    SessionManager,
    SessionNotFound,
    SessionResources,
)

TTL = 1800.0
MAX_LIFETIME = timedelta(days=1)  # also the longest time for which open streams renew a session
MAX_STALENESS = 60.0  # of a copy: a change ends it earlier, while the store announces changes
SESSION_HEADER = "mcp-session-id"
HTTP = "http.response"
# RFC 9110, section 7.6.1: these headers concern one connection. httpx writes its own Host. The
# server under each replica writes Date and Server, so passing them on would send them twice.
NOT_FORWARDED = frozenset(
    b"connection date host keep-alive mcp-session-id proxy-authenticate proxy-authorization"
    b" proxy-connection server te trailer transfer-encoding upgrade".split()
)


class Upstream(msgspec.Struct, frozen=True):
    """The backend's side of a session."""

    url: str
    session_id: str = ""


@dataclass(frozen=True)
class Connections:
    """The connections of this replica to the backend of one session."""

    http: httpx.AsyncClient
    upstream: Upstream

    @asynccontextmanager
    async def request(
        self, method: str, headers: Iterable[tuple[bytes, bytes]] = (), content: bytes = b""
    ) -> AsyncIterator[httpx.Response]:
        """Send a request, and give its response with the body still unread."""
        # `http.build_request` would add default headers, and the cookies of other clients.
        request = httpx.Request(
            method,
            self.upstream.url,
            headers=forwarded(headers, self.upstream.session_id),
            content=content,
            extensions={"timeout": self.http.timeout.as_dict()},
        )
        response = await self.http.send(request, stream=True)
        try:
            yield response
        finally:  # also when the block is cancelled
            with anyio.CancelScope(shield=True):
                await response.aclose()


class Proxy:
    """The MCP endpoint. Requests without a session, which may open one, go to `newcomers`."""

    def __init__(
        self,
        sessions: SessionManager[Upstream],
        resources: SessionResources[Connections, Upstream],
        newcomers: Connections,
    ) -> None:
        self._sessions = sessions
        self._resources = resources
        self._newcomers = newcomers

    async def handle(self, request: Request) -> ASGIApp:
        """Answer a request of any method."""
        await request.body()  # Starlette keeps it; later the client may have disconnected
        ids = request.headers.getlist(SESSION_HEADER)
        if len(ids) > 1:
            raise InvalidSessionId("the request names more than one session")
        return partial(self._answer, request, ids[0] if ids else None)

    async def _answer(
        self, request: Request, id: str | None, _scope: Scope, receive: Receive, send: Send
    ) -> None:
        """Pass a request on, and the response back, until its session ends."""
        method, headers, content = request.method, request.headers.raw, await request.body()
        connecting: AbstractAsyncContextManager[Connections] = nullcontext(self._newcomers)
        if id is not None:  # a DELETE ends the session itself
            connecting = self._resources.use(id, cancel=method != "DELETE")
        started = False
        async with while_connected(receive):
            try:
                async with (
                    connecting as connections,
                    connections.request(method, headers, content) as response,
                ):
                    id = await self._follow(method, id, response)
                    status, kept = response.status_code, forwarded(response.headers.raw, id)
                    await send({"type": f"{HTTP}.start", "status": status, "headers": kept})
                    started = True
                    async for chunk in response.aiter_raw():
                        await send({"type": f"{HTTP}.body", "body": chunk, "more_body": True})
            except SessionNotFound:
                if not started:
                    raise
            await send({"type": f"{HTTP}.body", "body": b"", "more_body": False})

    async def _follow(self, method: str, id: str | None, response: httpx.Response) -> str | None:
        """Open or end the session as the backend has done, and return its id."""
        if id is not None and response.status_code == 404:
            await self._sessions.delete(id)
            raise SessionNotFound("the backend does not know the session any more")
        if id is not None and method == "DELETE" and response.is_success:
            await self._sessions.delete(id)
        theirs = response.headers.get(SESSION_HEADER)
        if id is not None or theirs is None or not response.is_success:
            return id
        upstream = Upstream(str(response.request.url), theirs)
        try:
            return (await self._sessions.create(kind="mcp", data=upstream)).id
        except SessionError:
            # The client cannot use the backend's session, so end it before it idles out.
            ending = Connections(self._newcomers.http, upstream).request("DELETE")
            with suppress(httpx.HTTPError, TimeoutError):
                async with asyncio.timeout(5), ending:
                    pass
            raise


@asynccontextmanager
async def while_connected(receive: Receive) -> AsyncIterator[None]:
    """Cancel the block when the client disconnects."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        block.cancel()

    with anyio.CancelScope() as block:
        task = asyncio.create_task(watch())
        try:
            yield
        finally:
            task.cancel()


def forwarded(
    headers: Iterable[tuple[bytes, bytes]], session_id: str | None
) -> list[tuple[bytes, bytes]]:
    """The headers to pass on, with the session id that the receiver knows."""
    lowered = [(name.lower(), value) for name, value in headers]
    named = b",".join(value for name, value in lowered if name == b"connection")
    dropped = NOT_FORWARDED | {name.strip().lower() for name in named.split(b",")}
    kept = [(name, value) for name, value in lowered if name not in dropped]
    return [*kept, (SESSION_HEADER.encode(), session_id.encode())] if session_id else kept


class JsonRpcRequest(msgspec.Struct):
    """The part of a request that an error response repeats. Notifications come without an id."""

    method: str
    id: str | int | float | None = None


async def refuse(request: Request, error: Exception) -> Response:
    """Turn an exception into an HTTP status and a JSON-RPC error."""
    status = error.status if isinstance(error, SessionError) else 502
    code, message = {
        400: (-32600, "Invalid session id"),
        404: (-32001, "Session not found"),
        502: (-32000, "Backend unavailable"),
        503: (-32000, "Session store unavailable"),
    }.get(status, (-32603, "Internal error"))
    answer: dict[str, object] = {"jsonrpc": "2.0", "error": {"code": code, "message": message}}
    with suppress(msgspec.DecodeError):  # not JSON, or not a request
        request_id = msgspec.json.decode(await request.body(), type=JsonRpcRequest).id
        answer |= {} if request_id is None else {"id": request_id}
    return Response(msgspec.json.encode(answer), status, media_type="application/json")


def create_app(proxy: Proxy) -> Starlette:
    """The proxy as an ASGI application."""
    return Starlette(
        routes=[Route("/mcp", proxy.handle, methods=["GET", "POST", "DELETE"])],
        exception_handlers={
            SessionError: refuse,
            httpx.HTTPError: refuse,
            ClientDisconnect: lambda _request, _error: Response(status_code=400),  # nobody reads it
        },
    )


async def main() -> None:
    """Run one replica."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--store", required=True, help="the URL of Redis or Valkey")
    parser.add_argument("--backend", required=True, help="the URL of the MCP server's endpoint")
    parser.add_argument("--port", type=int, default=0, help="by default a free one")
    arguments = parser.parse_args()
    shared = RedisStorage.from_url(arguments.store, ttl=TTL, codec=JsonCodec(Upstream), timeout=2)
    storage = NearCache(shared, max_staleness=MAX_STALENESS)
    # An event stream may stay silent for hours, and each one holds a connection.
    client = partial(
        httpx.AsyncClient,
        timeout=httpx.Timeout(5, read=None),
        limits=httpx.Limits(max_connections=None),
        trust_env=False,
        verify=httpx.create_ssl_context(trust_env=False),  # one for all, as it is slow to make
    )

    async def connect(session: Session[Upstream]) -> Connections:
        return Connections(client(), session.data)

    async with (
        storage,
        SessionManager(storage, max_lifetime=MAX_LIFETIME) as sessions,
        SessionResources(
            sessions, connect, lambda each: each.http.aclose(), max_open=10_000, idle=60
        ) as resources,
        client() as http,
    ):
        await shared.ping()  # before the first request, so that changes are announced by then
        proxy = Proxy(sessions, resources, Connections(http, Upstream(arguments.backend)))
        await serve(create_app(proxy), arguments.port)


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        asyncio.run(main())
