"""The demonstration runs and is honest, and its proxy answers errors as MCP asks for."""

import asyncio
import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.requests import ClientDisconnect

from aiosessions import (
    CorruptSession,
    JsonCodec,
    LocalStorage,
    Session,
    SessionError,
    SessionManager,
    SessionNotFound,
    StorageUnavailable,
    When,
)

DEMO = Path(__file__).parents[2] / "examples" / "mcp_proxy" / "demo.py"
sys.path.insert(0, str(DEMO.parent))  # as if it ran from there: its files import each other

from proxy import Upstream, create_app, end_to_end  # noqa: E402

BACKEND = "http://backend/mcp"
CALL = {"jsonrpc": "2.0", "id": 7, "method": "tools/call", "params": {"name": "add"}}
NOTIFICATION = {"jsonrpc": "2.0", "method": "notifications/initialized"}


def reply(status: int, body: bytes = b"", **headers: str) -> httpx.Response:
    """A response as it comes from a network: its body has yet to be read."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return httpx.Response(status, headers=named, stream=httpx.ByteStream(body))


class Backend:
    """An MCP server as far as HTTP goes; keeps the requests that it got."""

    def __init__(self) -> None:
        self.requests: list[httpx.Request] = []
        self.answer: Callable[[httpx.Request], httpx.Response] | None = None

    def __call__(self, request: httpx.Request) -> httpx.Response:
        """Answer a request."""
        self.requests.append(request)
        if self.answer is not None:
            return self.answer(request)
        return reply(200, b'{"result":"fine"}', mcp_session_id="theirs")


class Broken(LocalStorage[Upstream]):
    """A storage that raises `error`, once it has one."""

    error: SessionError | None = None

    async def load(self, id: str) -> Session[Upstream]:
        """See `Storage.load`."""
        if self.error:
            raise self.error
        return await super().load(id)

    async def store(self, session: Session[Upstream], *, when: When = When.ALWAYS) -> None:
        """See `Storage.store`."""
        if self.error:
            raise self.error
        await super().store(session, when=when)


@pytest.fixture
def storage() -> Broken:
    """What the proxy keeps its sessions in."""
    return Broken(ttl=60, codec=JsonCodec(data_type=Upstream))


@pytest.fixture
def backend() -> Backend:
    """What the proxy sends requests on to."""
    return Backend()


@pytest.fixture
async def app(storage: Broken, backend: Backend) -> AsyncIterator[Any]:
    """The proxy, as an ASGI application."""
    transport = httpx.MockTransport(backend)
    async with SessionManager(storage) as sessions, httpx.AsyncClient(transport=transport) as http:
        yield create_app(sessions, http, BACKEND)


@pytest.fixture
async def client(app: Any) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the proxy."""
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://proxy") as http:
        yield http


async def opened(client: httpx.AsyncClient) -> dict[str, str]:
    """Open a session; returns the header that names it."""
    response = await client.post("/mcp", json={**CALL, "method": "initialize"})
    assert response.status_code == 200
    return {"Mcp-Session-Id": response.headers["mcp-session-id"]}


async def test_proxy_exchanges_ids(client: httpx.AsyncClient, backend: Backend) -> None:
    """Client and backend each see an id of their own, never the other's."""
    header = await opened(client)
    response = await client.post("/mcp", headers=header, json=CALL)
    assert response.json() == {"result": "fine"}
    assert response.headers["mcp-session-id"] == header["Mcp-Session-Id"] != "theirs"
    assert [each.headers.get("mcp-session-id") for each in backend.requests] == [None, "theirs"]
    assert [str(each.url) for each in backend.requests] == [BACKEND, BACKEND]


async def test_session_goes_where_it_was_opened(
    client: httpx.AsyncClient, storage: Broken, backend: Backend
) -> None:
    """A request goes to the backend that its session names, whatever this replica's own is."""
    elsewhere = Upstream(url="http://elsewhere/mcp", session_id="there")
    await storage.store(Session(id="mine", data=elsewhere))
    await client.get("/mcp", headers={"Mcp-Session-Id": "mine"})
    assert str(backend.requests[0].url) == elsewhere.url
    assert backend.requests[0].headers["mcp-session-id"] == elsewhere.session_id


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("POST", NOTIFICATION),
        ("POST", {"jsonrpc": "2.0", "id": 7, "result": {}}),
        ("POST", {"jsonrpc": "2.0", "id": None, "method": "ping"}),
        ("POST", [CALL]),
        ("GET", None),
        ("DELETE", None),
    ],
    ids=["notification", "response", "null", "batch", "GET", "DELETE"],
)
async def test_unknown_session_without_id(
    client: httpx.AsyncClient, backend: Backend, method: str, message: object
) -> None:
    """What is no request with an id gets a 404 whose error has no "id" key."""
    header = {"Mcp-Session-Id": "unknown"}
    response = await client.request(method, "/mcp", headers=header, json=message)
    assert response.status_code == 404
    error = {"code": -32001, "message": "Session not found"}
    assert response.json() == {"jsonrpc": "2.0", "error": error}
    assert response.headers["content-type"] == "application/json"
    assert not backend.requests


@pytest.mark.parametrize("request_id", [7, 0, "seven", ""])
async def test_unknown_session_with_id(client: httpx.AsyncClient, request_id: int | str) -> None:
    """A request gets a 404 with its own id in the error, of the type it had."""
    header = {"Mcp-Session-Id": "unknown"}
    response = await client.post("/mcp", headers=header, json={**CALL, "id": request_id})
    assert response.status_code == 404
    error = {"code": -32001, "message": "Session not found"}
    assert response.json() == {"jsonrpc": "2.0", "id": request_id, "error": error}


@pytest.mark.parametrize("session_id", ["", "two words", "x" * 257, "s\xe9ance"])
async def test_malformed_session_id(client: httpx.AsyncClient, session_id: str) -> None:
    """A header that cannot be a session id is a 400, and is not repeated in the answer."""
    header = [(b"Mcp-Session-Id", session_id.encode("latin-1"))]
    response = await client.post("/mcp", headers=header, json=CALL)
    assert response.status_code == 400
    error = {"code": -32600, "message": "Invalid session id"}
    assert response.json() == {"jsonrpc": "2.0", "id": 7, "error": error}


@pytest.mark.parametrize(
    ("error", "code"),
    [(StorageUnavailable("down"), -32000), (CorruptSession("garbage"), -32603)],
    ids=["unavailable", "corrupt"],
)
async def test_storage_errors(
    client: httpx.AsyncClient, storage: Broken, backend: Backend, error: SessionError, code: int
) -> None:
    """An outage is a 503 and damage is a 500, never a 404; the backend is not bothered."""
    header = await opened(client)
    storage.error = error
    for message, identified in [(CALL, {"id": 7}), (NOTIFICATION, {})]:
        response = await client.post("/mcp", headers=header, json=message)
        assert response.status_code == error.status
        body = response.json()
        assert body.pop("error")["code"] == code
        assert body == {"jsonrpc": "2.0", **identified}
    assert len(backend.requests) == 1


async def test_closed_storage(client: httpx.AsyncClient, storage: Broken) -> None:
    """A storage that has been closed is a 503, too."""
    header = await opened(client)
    await storage.aclose()
    response = await client.post("/mcp", headers=header, json=CALL)
    assert response.status_code == 503
    assert response.json()["id"] == 7


async def test_session_that_cannot_be_stored(
    client: httpx.AsyncClient, storage: Broken, backend: Backend
) -> None:
    """When a new session cannot be stored, the client gets a 503 and the backend's is ended."""
    storage.error = StorageUnavailable("down")
    response = await client.post("/mcp", json={**CALL, "method": "initialize"})
    assert response.status_code == 503
    assert "mcp-session-id" not in response.headers
    assert [each.method for each in backend.requests] == ["POST", "DELETE"]
    assert backend.requests[1].headers["mcp-session-id"] == "theirs"


async def test_backend_that_cannot_be_reached(client: httpx.AsyncClient, backend: Backend) -> None:
    """A backend that is down is a 502, and its sessions are kept."""
    header = await opened(client)

    def refuse(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused", request=request)

    backend.answer = refuse
    response = await client.post("/mcp", headers=header, json=CALL)
    assert response.status_code == 502
    assert response.json()["id"] == 7
    backend.answer = None
    assert (await client.post("/mcp", headers=header, json=CALL)).status_code == 200


@pytest.mark.parametrize(("method", "status"), [("DELETE", 200), ("DELETE", 204), ("POST", 404)])
async def test_session_ends(
    client: httpx.AsyncClient, storage: Broken, backend: Backend, method: str, status: int
) -> None:
    """A session ends with a DELETE that the backend accepts, and when the backend forgot it."""
    header = await opened(client)
    backend.answer = lambda _: reply(status)
    response = await client.request(method, "/mcp", headers=header)
    assert response.status_code == status
    with pytest.raises(SessionNotFound):
        await storage.load(header["Mcp-Session-Id"])


async def test_session_survives_refused_delete(client: httpx.AsyncClient, backend: Backend) -> None:
    """A DELETE that the backend does not allow leaves the session alone."""
    header = await opened(client)
    backend.answer = lambda _: reply(405)
    assert (await client.delete("/mcp", headers=header)).status_code == 405
    backend.answer = None
    assert (await client.post("/mcp", headers=header, json=CALL)).status_code == 200


async def test_refused_initialize_opens_nothing(
    client: httpx.AsyncClient, backend: Backend
) -> None:
    """An error answer opens no session, and the id in it goes no further."""
    backend.answer = lambda _: reply(400, mcp_session_id="theirs")
    response = await client.post("/mcp", json=CALL)
    assert response.status_code == 400
    assert "mcp-session-id" not in response.headers


def test_hop_by_hop_headers_stay() -> None:
    """Headers that concern one connection are dropped, those that `Connection` names included."""
    headers = [
        (b"Connection", b"close, X-Hop"),
        (b"X-Hop", b"1"),
        (b"Transfer-Encoding", b"chunked"),
        (b"Mcp-Session-Id", b"inner"),
        (b"Set-Cookie", b"a=1"),
        (b"Set-Cookie", b"b=2"),
    ]
    cookies = [(b"set-cookie", b"a=1"), (b"set-cookie", b"b=2")]
    assert end_to_end(headers, None) == cookies
    assert end_to_end(headers, "outer") == [*cookies, (b"mcp-session-id", b"outer")]


class Stream(httpx.AsyncByteStream):
    """An event stream with one event and no end, until `more` is set."""

    def __init__(self) -> None:
        self.more = asyncio.Event()
        self.closed = False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        yield b"data: 1\n\n"
        await self.more.wait()
        yield b"data: 2\n\n"

    async def aclose(self) -> None:
        """See `httpx.AsyncByteStream`."""
        self.closed = True


@pytest.mark.parametrize("spec_version", ["2.3", "2.4"])
async def test_event_stream(app: Any, backend: Backend, spec_version: str) -> None:
    """Events pass as they arrive, and the backend's stream is closed when the client goes.

    Servers say in two ways that the client has gone: to whoever listens (ASGI 2.3) and to whoever
    goes on sending (2.4).
    """
    stream = Stream()
    kind = {"Content-Type": "text/event-stream"}
    backend.answer = lambda _: httpx.Response(200, headers=kind, stream=stream)
    arrived, gone = asyncio.Event(), asyncio.Event()
    requested = False

    async def receive() -> dict[str, Any]:
        nonlocal requested
        if requested:
            await gone.wait()
            return {"type": "http.disconnect"}
        requested = True
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        if gone.is_set():
            raise OSError
        if message.get("body") == b"data: 1\n\n":
            arrived.set()

    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": spec_version},
        "http_version": "1.1",
        "method": "GET",
        "scheme": "http",
        "path": "/mcp",
        "query_string": b"",
        "headers": [],
    }
    async with asyncio.timeout(10):
        running = asyncio.create_task(app(scope, receive, send))
        await arrived.wait()
        assert not stream.closed
        gone.set()
        if spec_version == "2.4":
            stream.more.set()
        with suppress(ClientDisconnect):
            await running
    assert stream.closed


@contextmanager
def demo(**environment: str) -> Iterator[subprocess.Popen[str]]:
    """The demonstration, running in a process group of its own."""
    process = subprocess.Popen(  # noqa: S603 - a file of this repository
        [sys.executable, str(DEMO)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
        start_new_session=True,
    )
    with process:
        try:
            yield process
        finally:
            process.terminate()  # it cleans up, should it still be running
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=30)
            process.kill()


def assert_nothing_is_left(process: subprocess.Popen[str], output: str) -> None:
    """Neither the processes that the output names nor others of the demonstration's group exist."""
    named = [int(pid) for pid in re.findall(r", process (\d+)\n", output)]
    assert len(named) == 3
    for pid in named:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


def test_demo_passes() -> None:
    """It succeeds, says so, and shows what every request cost."""
    with demo() as process:
        output, errors = process.communicate(timeout=90)
    assert process.returncode == 0, output + errors
    assert "Traceback" not in errors
    assert re.search(r"POST initialize +via A  200  \d commands?: EVALSHA", output)
    assert re.search(r"POST tools/call add +via A  200  1 command: GETEX\n", output)
    assert re.search(r"POST tools/call add +via B  200  1 command: GETEX\n", output)
    assert "the end of A: -9\n" in output
    assert re.search(r"POST tools/call add +via B  404  1 command: GETEX\n", output)
    assert '"id":8,"error":{"code":-32001,"message":"Session not found"}}' in output
    assert '{"jsonrpc":"2.0","error":{"code":-32001,"message":"Session not found"}}' in output
    assert re.search(r"POST tools/call add +via B  503  the store is down\n", output)
    assert re.search(r"\nPASS: all \d+ checks\n$", output)
    assert_nothing_is_left(process, output)


def test_demo_notices_what_differs(tmp_path: Path) -> None:
    """One command too many, and it fails."""
    (tmp_path / "sitecustomize.py").write_text(
        "from aiosessions import RedisStorage\n"
        "once = RedisStorage.load\n"
        "async def twice(self, id):\n"
        "    await once(self, id)\n"
        "    return await once(self, id)\n"
        "RedisStorage.load = twice\n"
    )
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    with demo(PYTHONPATH=path) as process:
        output, _ = process.communicate(timeout=90)
    assert process.returncode == 1
    assert "DIFFERS  commands: ['getex', 'getex'], not ['getex']\n" in output
    assert "\nFAIL: " in output
    assert_nothing_is_left(process, output)


@pytest.mark.parametrize("how", ["Ctrl-C", "SIGTERM"])
def test_demo_is_interrupted(how: str) -> None:
    """Interrupted half-way, it takes along all that it has started."""
    with demo() as process:
        assert process.stdout is not None
        output = ""
        for line in process.stdout:
            output += line
            if line.startswith("3."):
                break
        if how == "Ctrl-C":  # a terminal tells the whole group
            os.killpg(process.pid, signal.SIGINT)
        else:
            process.terminate()
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "everything that was started has been stopped" in errors
    assert_nothing_is_left(process, output)
