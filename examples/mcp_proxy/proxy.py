"""An MCP proxy for streamable HTTP that runs as any number of replicas.

- A client knows the proxy's session id only. The backend's URL and session id are the `data` of
  that session, which all replicas share.
- A request within a session costs one command in the store. It finds the session and renews its
  time to live.
- While a call or an event stream is open, the proxy renews the session from time to time. If the
  session was deleted, the proxy ends the stream. If the store is down, the proxy tries again later.
- Response bodies pass through as they arrive. When the client disconnects, the proxy closes the
  backend's stream.
- A session that does not exist is 404, and an MCP client then opens a new one. A store that does
  not answer is 503, because the session may still exist.
"""

import argparse
import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from datetime import timedelta
from functools import partial

import anyio
import httpx
import msgspec
from serve import serve
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from aiosessions import (
    InvalidSessionId,
    JsonCodec,
    RedisStorage,
    Session,
    SessionError,
    SessionManager,
    SessionNotFound,
    StorageUnavailable,
)

TTL = 1800.0
MAX_LIFETIME = timedelta(days=1)  # also the longest time for which open streams renew a session
SESSION_HEADER = "mcp-session-id"
# RFC 9110, section 7.6.1: these headers concern one connection. httpx writes its own Host. The
# server under each replica writes Date and Server, so passing them on would send them twice.
NOT_FORWARDED = frozenset(
    b"connection date host keep-alive mcp-session-id proxy-authenticate proxy-authorization"
    b" proxy-connection server te trailer transfer-encoding upgrade".split()
)


class Upstream(msgspec.Struct, frozen=True):
    """The backend's side of a session."""

    url: str
    session_id: str


class Proxy:
    """The MCP endpoint. It borrows the manager and the HTTP client.

    Args:
        sessions: The sessions that all replicas share.
        http: The client for requests to backends.
        backend: The URL of the MCP endpoint on which new sessions are opened.
        renew_every: The seconds between two renewals while a call or a stream is open.
    """

    def __init__(
        self,
        sessions: SessionManager[Upstream],
        http: httpx.AsyncClient,
        backend: str,
        renew_every: float = TTL / 4,
    ) -> None:
        self._sessions = sessions
        self._http = http
        self._backend = backend
        self._renew_every = renew_every

    async def handle(self, request: Request) -> Response:
        """Answer a request of any method."""
        await request.body()  # Starlette keeps it; later the client may have disconnected
        session = await self._session_of(request)
        async with self._renewing(request, session) as block:
            response = await self._forward(request, session.data if session else None)
        if block.cancelled_caught:
            raise SessionNotFound("the session ended during the call")
        try:
            if session is None:
                session = await self._opened(response)
            elif _ended(request, response):
                await self._sessions.delete(session.id)
        except BaseException:
            await response.aclose()
            raise
        renewing = partial(self._renewing, request, session)
        return Relay(response, session.id if session else None, renewing)

    async def _session_of(self, request: Request) -> Session[Upstream] | None:
        ids = request.headers.getlist(SESSION_HEADER)
        if len(ids) > 1:
            raise InvalidSessionId("the request names more than one session")
        return await self._sessions.get(ids[0]) if ids else None

    async def _forward(self, request: Request, upstream: Upstream | None) -> httpx.Response:
        """Send the request to the backend, and return its response with the body still unread."""
        headers = forwarded(request.headers.raw, upstream.session_id if upstream else None)
        url = upstream.url if upstream else self._backend
        return await self._send(request.method, url, headers, await request.body())

    async def _send(
        self, method: str, url: str, headers: list[tuple[bytes, bytes]], content: bytes = b""
    ) -> httpx.Response:
        # `http.build_request` would add default headers, and the cookies of other clients.
        timeout = {"timeout": self._http.timeout.as_dict()}
        request = httpx.Request(method, url, headers=headers, content=content, extensions=timeout)
        return await self._http.send(request, stream=True)

    async def _opened(self, response: httpx.Response) -> Session[Upstream] | None:
        """Store a new session if the backend has opened one."""
        theirs = response.headers.get(SESSION_HEADER)
        if theirs is None or not response.is_success:
            return None
        upstream = Upstream(url=str(response.request.url), session_id=theirs)
        try:
            return await self._sessions.create(kind="mcp", data=upstream)
        except SessionError:
            # The client cannot use the backend's session, so end it before it idles out.
            with suppress(httpx.HTTPError, TimeoutError):
                async with asyncio.timeout(5):
                    ended = await self._send("DELETE", upstream.url, forwarded([], theirs))
                    await ended.aclose()
            raise

    @asynccontextmanager
    async def _renewing(
        self, request: Request, session: Session[Upstream] | None
    ) -> AsyncIterator[anyio.CancelScope]:
        """Renew the session while the block runs.

        Cancel the block when the session has ended, or the client has disconnected.
        """
        with anyio.CancelScope() as block:
            task = asyncio.create_task(self._renew(request, session, block))
            try:
                yield block
            finally:
                task.cancel()
                with anyio.CancelScope(shield=True):
                    await asyncio.wait([task])

    async def _renew(
        self, request: Request, session: Session[Upstream] | None, block: anyio.CancelScope
    ) -> None:
        with suppress(SessionError):  # deleted, expired, or unreadable
            while True:
                await asyncio.sleep(self._renew_every)
                if await request.is_disconnected():
                    break
                with suppress(StorageUnavailable):  # an outage: try again next time
                    if session is not None:
                        await self._sessions.get(session.id)
        block.cancel()


class Relay(StreamingResponse):
    """Passes the backend's response on, piece by piece, while the session is being renewed."""

    def __init__(
        self,
        upstream: httpx.Response,
        session_id: str | None,
        renewing: Callable[[], AbstractAsyncContextManager[object]],
    ) -> None:
        super().__init__(upstream.aiter_raw(), upstream.status_code)
        self.raw_headers = forwarded(upstream.headers.raw, session_id)
        self._upstream = upstream
        self._renewing = renewing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response, and close the backend's stream in any case."""
        try:
            await super().__call__(scope, receive, send)
        finally:  # Starlette cancels the call when the client disconnects
            with anyio.CancelScope(shield=True):
                await self._upstream.aclose()

    async def stream_response(self, send: Send) -> None:
        """Send the headers, then the body until it ends or the session does."""
        status, headers = self.status_code, self.raw_headers
        await send({"type": "http.response.start", "status": status, "headers": headers})
        async with self._renewing():
            async for chunk in self.body_iterator:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def forwarded(
    headers: Iterable[tuple[bytes, bytes]], session_id: str | None
) -> list[tuple[bytes, bytes]]:
    """The headers to pass on, with the session id that the receiver knows."""
    lowered = [(name.lower(), value) for name, value in headers]
    named = b",".join(value for name, value in lowered if name == b"connection")
    dropped = NOT_FORWARDED | {name.strip().lower() for name in named.split(b",")}
    kept = [(name, value) for name, value in lowered if name not in dropped]
    return [*kept, (SESSION_HEADER.encode(), session_id.encode())] if session_id else kept


def _ended(request: Request, response: httpx.Response) -> bool:
    """Whether the client has ended the backend's session, or the backend no longer knows it."""
    deleted = request.method == "DELETE" and response.is_success
    return deleted or response.status_code == 404


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
    storage = RedisStorage.from_url(
        arguments.store, ttl=TTL, codec=JsonCodec(data_type=Upstream), timeout=2
    )
    # An event stream may stay silent for hours, and each one holds a connection.
    http = httpx.AsyncClient(
        timeout=httpx.Timeout(5, read=None),
        limits=httpx.Limits(max_connections=None),
        trust_env=False,
    )
    async with storage, SessionManager(storage, max_lifetime=MAX_LIFETIME) as sessions, http:
        await serve(create_app(Proxy(sessions, http, arguments.backend)), arguments.port)


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        asyncio.run(main())
