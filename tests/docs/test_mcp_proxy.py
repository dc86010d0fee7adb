"""The MCP proxy of the examples: ids, errors, headers, and the end of open requests."""

import asyncio
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from aiosessions import (
    CorruptSession,
    JsonCodec,
    LocalStorage,
    NearCache,
    Session,
    SessionError,
    SessionManager,
    SessionResources,
    StorageClosed,
    StorageUnavailable,
)
from tests.support.storages import InterceptedStorage

# The files of the example import each other by their bare names.
sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "mcp_proxy"))

from proxy import Connections, Proxy, Upstream, create_app, forwarded

CODEC = JsonCodec(data_type=Upstream)
CALL = {"jsonrpc": "2.0", "id": 7, "method": "tools/call", "params": {"name": "add"}}


class Backend(httpx.AsyncByteStream):
    """A server that answers each request with a stream of one event.

    Attributes:
        requests: The requests so far.
        status: The status of responses, or None if it cannot be reached.
        answers, ends: Unset one to hold back the responses, or the end of each.
        closed: Set when the proxy has closed a request or a response.
        reached: Set when a request or its response is held back.
    """

    def __init__(self) -> None:
        self.requests: list[httpx.Request] = []
        self.status: int | None = 200
        self.answers, self.ends, self.closed, self.reached = (asyncio.Event() for _ in range(4))
        self.answers.set()
        self.ends.set()

    async def answer(self, request: httpx.Request) -> httpx.Response:
        """Answer a request."""
        self.requests.append(request)
        if not self.answers.is_set():
            self.reached.set()
        try:
            await self.answers.wait()
        except asyncio.CancelledError:
            self.closed.set()
            raise
        if self.status is None:
            raise httpx.ConnectError("refused")
        headers = {"Mcp-Session-Id": "theirs", "Date": "today", "Server": "backend"}
        headers["Set-Cookie"] = "user=first"
        return httpx.Response(self.status, headers=headers, stream=self)

    async def __aiter__(self) -> AsyncIterator[bytes]:
        yield b"data: fine\n\n"
        if not self.ends.is_set():
            self.reached.set()
        await self.ends.wait()

    async def aclose(self) -> None:
        """Close a response."""
        self.closed.set()


@pytest.fixture
def storage() -> InterceptedStorage:
    """The storage of the proxy."""
    return InterceptedStorage(LocalStorage(ttl=60, codec=CODEC))


@pytest.fixture
def backend() -> Backend:
    """The server behind the proxy."""
    return Backend()


@asynccontextmanager
async def proxied(storage: Any, backend: Backend) -> AsyncIterator[Any]:
    """The proxy as an ASGI application, which leaves nothing open."""

    def connections(upstream: Upstream) -> Connections:
        http = httpx.AsyncClient(transport=httpx.MockTransport(backend.answer))
        return Connections(http, upstream)

    async def connect(session: Session[Upstream]) -> Connections:
        return connections(session.data)

    async def close(connections: Connections) -> None:
        await connections.http.aclose()

    sessions = SessionManager[Upstream](storage)
    async with SessionResources(sessions, connect, close, max_open=10, idle=60) as resources:
        newcomers = connections(Upstream("http://backend/mcp"))
        yield create_app(Proxy(sessions, resources, newcomers))
        await close(newcomers)
    assert resources.statistics().open == 0


@pytest.fixture
async def client(storage: Any, backend: Backend) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the proxy."""
    async with (
        proxied(storage, backend) as app,
        httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://proxy") as http,
    ):
        yield http


@asynccontextmanager
async def served(storage: Any, backend: Backend) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the proxy over TCP, for streams."""
    async with proxied(storage, backend) as app:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
            task = asyncio.create_task(server.serve(sockets=[listener]))
            url = f"http://127.0.0.1:{listener.getsockname()[1]}"
            async with asyncio.timeout(20), httpx.AsyncClient(base_url=url) as client:
                yield client
            server.should_exit = True
            await task


async def opened(client: httpx.AsyncClient) -> dict[str, str]:
    """Open a session, and return the header that names it."""
    response = await client.post("/mcp", json={**CALL, "method": "initialize"})
    assert response.status_code == 200
    return {"Mcp-Session-Id": response.headers["mcp-session-id"]}


async def test_backend_gets_the_headers_of_the_client_only(client: Any, backend: Backend) -> None:
    """The proxy adds neither defaults of httpx nor cookies that another client has got."""
    await opened(client)
    client.cookies.clear()
    del client.headers["accept-encoding"]
    await client.post("/mcp", json=CALL)
    assert not {"cookie", "accept-encoding"} & backend.requests[-1].headers.keys()
    assert backend.requests[-1].headers["user-agent"] == client.headers["user-agent"]


async def test_client_and_backend_use_different_ids(
    client: Any, storage: Any, backend: Backend
) -> None:
    """The session names its backend, where this replica need not open new sessions."""
    header = await opened(client)
    response = await client.post("/mcp", headers=header, json=CALL)
    assert response.headers["mcp-session-id"] == header["Mcp-Session-Id"] != "theirs"
    await storage.store(Session(id="mine", data=Upstream(url="http://other/mcp", session_id="x")))
    await client.get("/mcp", headers={"Mcp-Session-Id": "mine"})
    ids = [(each.url.host, each.headers.get("mcp-session-id")) for each in backend.requests]
    assert ids == [("backend", None), ("backend", "theirs"), ("other", "x")]


@pytest.mark.parametrize(
    ("method", "message", "expected"),
    [
        ("POST", CALL, {"id": 7}),
        ("POST", {**CALL, "id": ""}, {"id": ""}),
        ("POST", {**CALL, "id": 0}, {"id": 0}),
        ("POST", {"jsonrpc": "2.0", "method": "notifications/initialized"}, {}),
        ("POST", {"jsonrpc": "2.0", "id": 7, "result": {}}, {}),
        ("POST", {**CALL, "id": None}, {}),
        ("POST", [CALL], {}),
        ("GET", None, {}),
        ("DELETE", None, {}),
    ],
)
async def test_unknown_session_is_404(
    client: Any, backend: Backend, method: str, message: object, expected: dict[str, object]
) -> None:
    """The error has the id of the request, and no "id" key if there was none."""
    header = {"Mcp-Session-Id": "unknown"}
    response = await client.request(method, "/mcp", headers=header, json=message)
    assert (response.status_code, response.headers["content-type"]) == (404, "application/json")
    error = {"code": -32001, "message": "Session not found"}
    assert response.json() == {"jsonrpc": "2.0", "error": error, **expected}
    assert not backend.requests


@pytest.mark.parametrize("ids", [[b""], [b"two words"], [b"x" * 257], [b"s\xe9ance"], [b"a", b"a"]])
async def test_malformed_or_repeated_id_is_400(
    client: Any, backend: Backend, ids: list[bytes]
) -> None:
    """The response does not repeat the id."""
    response = await client.post("/mcp", headers=[(b"Mcp-Session-Id", id) for id in ids], json=CALL)
    assert response.status_code == 400
    error = {"code": -32600, "message": "Invalid session id"}
    assert response.json() == {"jsonrpc": "2.0", "id": 7, "error": error}
    assert not backend.requests


@pytest.mark.parametrize(
    ("error", "status"),
    [(StorageUnavailable(""), 503), (StorageClosed(""), 503), (CorruptSession(""), 500)],
)
async def test_storage_error_is_not_404(
    client: Any, storage: Any, backend: Backend, error: SessionError, status: int
) -> None:
    """The backend does not get the request. A session that cannot be stored is ended there."""
    header = await opened(client)

    async def fail(*_: object) -> None:
        raise error

    storage.intercept(fail)
    response = await client.post("/mcp", headers=header, json=CALL)
    assert (response.status_code, response.json()["id"]) == (status, 7)
    response = await client.post("/mcp", json={**CALL, "method": "initialize"})
    assert response.status_code == status
    assert "mcp-session-id" not in response.headers
    assert [each.method for each in backend.requests] == ["POST", "POST", "DELETE"]
    assert backend.requests[2].headers["mcp-session-id"] == "theirs"


@pytest.mark.parametrize(
    ("method", "status", "then"),
    [
        ("DELETE", 200, 404),
        ("DELETE", 204, 404),
        ("DELETE", 405, 200),
        ("POST", 404, 404),
        ("POST", None, 200),
    ],
)
async def test_session_ends_with_the_backends(
    client: Any, backend: Backend, method: str, status: int | None, then: int
) -> None:
    """A session ends when the backend deletes or forgets its own, and not with an outage (502)."""
    header = await opened(client)
    backend.status = status
    response = await client.request(method, "/mcp", headers=header)
    assert response.status_code == (status or 502)
    backend.status = 200
    assert (await client.post("/mcp", headers=header, json=CALL)).status_code == then


async def test_refused_initialize_opens_no_session(client: Any, backend: Backend) -> None:
    """A session id in an error response does not reach the client."""
    backend.status = 400
    response = await client.post("/mcp", json=CALL)
    assert response.status_code == 400
    assert "mcp-session-id" not in response.headers


def test_headers_of_one_connection_are_not_forwarded() -> None:
    """Those that `Connection` names belong to them. The proxy's server writes its own Date."""
    hop = [(b"Connection", b"close, X-Hop"), (b"X-Hop", b"1"), (b"Transfer-Encoding", b"chunked")]
    cookies = [(b"set-cookie", b"a=1"), (b"set-cookie", b"b=2")]
    ours = [(b"Mcp-Session-Id", b"inner"), (b"Date", b"today"), (b"Server", b"backend")]
    headers = [*hop, *ours, *cookies]
    assert forwarded(headers, None) == cookies
    assert forwarded(headers, "outer") == [*cookies, (b"mcp-session-id", b"outer")]


# The backend holds its answer back, as in a long call, or only the end of it, as in a stream.
open_requests = pytest.mark.parametrize("held", ["answers", "ends"])


@open_requests
@pytest.mark.parametrize("deleted", [True, False])
async def test_open_request_ends_with_session_or_client(
    storage: Any, backend: Backend, held: str, *, deleted: bool
) -> None:
    """If the session is deleted elsewhere, a call gets 404, and a stream ends."""
    cache = NearCache[Upstream](storage.inner, max_staleness=30)
    async with served(cache, backend) as client:
        header = await opened(client)
        getattr(backend, held).clear()
        backend.closed.clear()
        call = asyncio.create_task(client.get("/mcp", headers=header))
        await backend.reached.wait()
        if deleted:
            await storage.delete(header["Mcp-Session-Id"])
            assert (await call).status_code == (404 if held == "answers" else 200)
        else:
            call.cancel()
        await backend.closed.wait()


async def test_client_ends_its_session_during_a_stream(storage: Any, backend: Backend) -> None:
    """The DELETE gets the backend's answer, and the stream ends."""
    async with served(storage.inner, backend) as client:
        header = await opened(client)
        backend.ends.clear()
        stream = asyncio.create_task(client.get("/mcp", headers=header))
        await backend.reached.wait()
        async with client.stream("DELETE", "/mcp", headers=header) as response:
            assert response.status_code == 200
            assert (await stream).text == "data: fine\n\n"
            backend.ends.set()
            assert await response.aread() == b"data: fine\n\n"
