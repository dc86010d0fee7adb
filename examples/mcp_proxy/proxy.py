"""An MCP proxy for streamable HTTP that runs as any number of replicas.

- The client's session id is the proxy's own. What it stands for, the backend's URL and session id,
  is the typed `data` of a session that all replicas share, and never reaches the client.
- A request that belongs to a session costs one command in the store: finding the session is also
  what keeps it alive.
- Response bodies pass through as they arrive, JSON and event streams alike. When the client goes
  away, the backend's stream is closed.
- A session that is not there is 404, which tells an MCP client to initialise again. A store that
  cannot be asked is 503: the session may well be alive.
"""

import argparse
import asyncio
from collections.abc import Iterable
from contextlib import suppress
from datetime import timedelta

import anyio
import httpx
import msgspec
from serve import serve
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from aiosessions import JsonCodec, RedisStorage, Session, SessionError, SessionManager

SESSION_HEADER = b"mcp-session-id"
# RFC 9110, section 7.6.1: these concern one connection. So does Host, which httpx writes anew.
HOP_BY_HOP = frozenset(
    b"connection host keep-alive proxy-authenticate proxy-authorization proxy-connection"
    b" te trailer transfer-encoding upgrade".split()
)


class Upstream(msgspec.Struct, frozen=True):
    """Where a client's session lives: what the replicas need to share."""

    url: str
    session_id: str


class Proxy:
    """The endpoint. Borrows all it is given."""

    def __init__(
        self, sessions: SessionManager[Upstream], http: httpx.AsyncClient, backend: str
    ) -> None:
        self._sessions = sessions
        self._http = http
        self._backend = backend

    async def handle(self, request: Request) -> Response:
        """Answer one request, of any method."""
        await request.body()  # Starlette keeps it; later on the client may have gone
        session: Session[Upstream] | None = None
        if (session_id := request.headers.get(SESSION_HEADER.decode())) is not None:
            session = await self._sessions.get(session_id)
        response = await self._forward(request, session.data if session else None)
        try:
            if session is None:
                session = await self._opened(response)
            elif _ended(request, response):
                await self._sessions.delete(session.id)
        except BaseException:
            await response.aclose()
            raise
        return Relay(response, session.id if session else None)

    async def _forward(self, request: Request, upstream: Upstream | None) -> httpx.Response:
        """Send the request on; comes back with the response's headers, its body still to come."""
        onward = self._http.build_request(
            request.method,
            upstream.url if upstream else self._backend,
            headers=end_to_end(request.headers.raw, upstream.session_id if upstream else None),
            content=await request.body(),
        )
        return await self._http.send(onward, stream=True)

    async def _opened(self, response: httpx.Response) -> Session[Upstream] | None:
        """The new session, if the backend has opened one."""
        theirs = response.headers.get(SESSION_HEADER.decode())
        if theirs is None or not response.is_success:
            return None
        upstream = Upstream(url=str(response.request.url), session_id=theirs)
        try:
            return await self._sessions.create(kind="streamable", data=upstream)
        except SessionError:
            # Nobody will ever find the backend's session again: end it now, not when it idles out.
            with suppress(httpx.HTTPError):
                headers = end_to_end([], theirs)
                await self._http.delete(upstream.url, headers=headers, timeout=5)
            raise


class Relay(StreamingResponse):
    """Passes the backend's answer on piece by piece."""

    def __init__(self, upstream: httpx.Response, session_id: str | None) -> None:
        super().__init__(upstream.aiter_raw(), upstream.status_code)
        self.raw_headers = end_to_end(upstream.headers.raw, session_id)
        self._upstream = upstream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it all, and close the backend's stream however that ends."""
        try:
            await super().__call__(scope, receive, send)
        finally:  # also when the client has gone, which Starlette answers by cancelling the above
            with anyio.CancelScope(shield=True):
                await self._upstream.aclose()


def end_to_end(
    headers: Iterable[tuple[bytes, bytes]], session_id: str | None
) -> list[tuple[bytes, bytes]]:
    """The headers to pass on, with the session id that the side they are passed to knows."""
    named = [(name.lower(), value) for name, value in headers]
    listed = {
        token.strip().lower()
        for name, value in named
        if name == b"connection"
        for token in value.split(b",")
    }
    dropped = HOP_BY_HOP | listed | {SESSION_HEADER}
    kept = [(name, value) for name, value in named if name not in dropped]
    return [*kept, (SESSION_HEADER, session_id.encode())] if session_id else kept


def _ended(request: Request, response: httpx.Response) -> bool:
    """Whether the backend's session is over: the client has ended it, or it is gone."""
    deleted = request.method == "DELETE" and response.is_success
    return deleted or response.status_code == 404


class JsonRpcRequest(msgspec.Struct):
    """As much of a request as its error answer needs. What has no method is no request."""

    method: str
    id: str | int | float | msgspec.UnsetType = msgspec.UNSET  # a notification has none


class JsonRpcError(msgspec.Struct, kw_only=True):
    """A JSON-RPC error answer. An id that is unset is left out altogether, never null."""

    jsonrpc: str = "2.0"
    id: str | int | float | msgspec.UnsetType = msgspec.UNSET
    error: dict[str, str | int]


async def refuse(request: Request, error: Exception) -> Response:
    """Turn what went wrong into an HTTP status and a JSON-RPC error."""
    status = error.status if isinstance(error, SessionError) else 502
    code, message = {
        400: (-32600, "Invalid session id"),
        404: (-32001, "Session not found"),
        502: (-32000, "Backend unavailable"),
        503: (-32000, "Session store unavailable"),
    }.get(status, (-32603, "Internal error"))
    answer = JsonRpcError(error={"code": code, "message": message})
    with suppress(msgspec.DecodeError):  # no JSON, no request, or no id that could be one
        answer.id = msgspec.json.decode(await request.body(), type=JsonRpcRequest).id
    return Response(msgspec.json.encode(answer), status, media_type="application/json")


def create_app(
    sessions: SessionManager[Upstream], http: httpx.AsyncClient, backend: str
) -> Starlette:
    """The proxy as an ASGI application.

    Args:
        sessions: Shared by all replicas.
        http: For the requests to backends.
        backend: The URL of the MCP endpoint that new sessions go to.
    """
    handle = Proxy(sessions, http, backend).handle
    return Starlette(
        routes=[Route("/mcp", handle, methods=["GET", "POST", "DELETE"])],
        exception_handlers={SessionError: refuse, httpx.HTTPError: refuse},
    )


async def main() -> None:
    """Run one replica."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--store", required=True, help="the URL of Redis or Valkey")
    parser.add_argument("--backend", required=True, help="the URL of the MCP server's endpoint")
    arguments = parser.parse_args()
    storage = RedisStorage.from_url(
        arguments.store,
        ttl=timedelta(minutes=30),
        codec=JsonCodec(data_type=Upstream),
        timeout=2,
    )
    # An event stream may stay silent and open for hours, and each holds a connection.
    http = httpx.AsyncClient(
        timeout=httpx.Timeout(5, read=None),
        limits=httpx.Limits(max_connections=None),
        trust_env=False,
    )
    async with storage, SessionManager(storage) as sessions, http:
        await serve(create_app(sessions, http, arguments.backend))


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):  # Ctrl-C
        asyncio.run(main())
