"""The same behaviours on each framework: uvicorn, HTTP and WebSockets, two replicas, one Valkey."""

from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
import websockets

from tests.support.replicas import Replica, replica
from tests.support.servers import Server

pytestmark = pytest.mark.slow
FRAMEWORKS = ["starlette", "fastapi", "litestar", "quart"]
Data = dict[str, Any]


class Browser:
    """A client with cookies.

    Attributes:
        url: The replica that answers.
    """

    def __init__(self, url: str, client: httpx.AsyncClient) -> None:
        self.url = url
        self._client = client

    async def do(self, action: str, **argument: Any) -> Data:
        """Request an action, and return its JSON."""
        response = await self.request(action, **argument)
        assert response.status_code == 200, response.text
        shown: Data = response.json()
        return shown

    async def request(self, action: str, **argument: Any) -> httpx.Response:
        """Request an action."""
        return await self._client.post(f"{self.url}/{action}", json=argument)

    async def plain(self) -> httpx.Response:
        """Request a page that ignores the session."""
        return await self._client.get(f"{self.url}/plain")

    @property
    def cookie(self) -> str | None:
        """The id in the jar."""
        return self._client.cookies.get("session")

    def chat(self, origin: str | None = None) -> "websockets.connect":
        """Open a WebSocket with the same cookie."""
        return websockets.connect(
            self.url.replace("http", "ws") + "/chat",
            additional_headers={"Cookie": f"session={self.cookie}"} if self.cookie else {},
            origin=websockets.Origin(origin or self.url),
            proxy=None,
        )


@dataclass(frozen=True)
class Site:
    """Two replicas of an application on one framework."""

    framework: str
    store: Server
    a: Replica
    b: Replica

    def browser(self) -> Browser:
        """A new client of the first replica."""
        return Browser(self.a.url, httpx.AsyncClient(timeout=30, trust_env=False))


def serve(stack: ExitStack, framework: str, store: Server) -> Replica:
    """Start a replica that ends with the stack."""
    app = f"tests.web.apps.on_{framework}:create_app"
    environment = {"AIOSESSIONS_TEST_URL": store.url}
    return stack.enter_context(replica(app, factory=True, environment=environment))


@pytest.fixture(scope="module", params=FRAMEWORKS)
def running_site(request: pytest.FixtureRequest, valkey: Server) -> Iterator[Site]:
    """Each framework in turn."""
    with ExitStack() as stack:
        a, b = (serve(stack, request.param, valkey) for _ in range(2))
        yield Site(request.param, valkey, a, b)


@pytest.fixture
def site(running_site: Site) -> Site:
    """The site, with an empty store."""
    running_site.store.flush()
    return running_site


@pytest.fixture
async def browser(site: Site) -> AsyncIterator[Browser]:
    """A client without a session."""
    browser = site.browser()
    async with browser._client:
        yield browser


async def test_request_session_is_a_mapping(browser: Browser) -> None:
    """Each change is there in the next request; so are changes inside of values."""
    steps: list[tuple[str, Data, Data]] = [
        ("set", {"a": 1, "list": []}, {"a": 1, "list": []}),
        ("update", {"b": {"c": 2}}, {"a": 1, "list": [], "b": {"c": 2}}),
        ("|=", {"a": 3}, {"a": 3, "list": [], "b": {"c": 2}}),
        ("append", {"x": 1}, {"a": 3, "list": [{"x": 1}], "b": {"c": 2}}),
        ("pop", {"key": "b"}, {"a": 3, "list": [{"x": 1}]}),
        ("setdefault", {"key": "d"}, {"a": 3, "list": [{"x": 1}], "d": "default"}),
        ("popitem", {}, {"a": 3, "list": [{"x": 1}]}),
        ("clear", {}, {}),
    ]
    for action, argument, expected in steps:
        assert (await browser.do(action, **argument))["data"] == expected, action
        assert (await browser.do("show"))["data"] == expected, action


async def test_untouched_session_is_not_stored(browser: Browser, site: Site) -> None:
    """A page without a session says nothing about cookies."""
    response = await browser.plain()
    shown = await browser.do("show")

    assert (response.status_code, response.text.strip('"')) == (200, "plain")
    assert not {"set-cookie", "vary"} & {*response.headers}
    assert shown["is_new"] is True
    with site.store.client() as client:
        assert client.dbsize() == 0


async def test_response_depends_on_the_cookie(browser: Browser) -> None:
    """Caches learn it from `Vary` and `Cache-Control`; only a new id is sent."""
    created = await browser.request("set", a=1)
    read = await browser.request("show")

    assert "session=" in created.headers["set-cookie"]
    assert created.headers["cache-control"] == "no-store"
    assert "set-cookie" not in read.headers
    assert read.headers["cache-control"] == "private"
    assert "cookie" in read.headers["vary"].lower()


async def test_sign_in_and_rotation_change_the_id(browser: Browser) -> None:
    """The handle knows the new id before the response; the data moves to it."""
    first = await browser.do("set", a=1)
    signed_in = await browser.do("sign-in", name="alice", device="laptop")
    rotated = await browser.do("rotate")

    assert browser.cookie == rotated["id"]
    assert len({first["id"], signed_in["id"], rotated["id"]}) == 3
    assert (await browser.do("show"))["principal"] == "alice"
    assert rotated["data"] == {"a": 1}


async def test_refused_sign_in_gives_no_rights(browser: Browser) -> None:
    """The exception of the framework becomes 403; the data of the attempt is stored."""
    response = await browser.request("fail")
    shown = await browser.do("show")

    assert response.status_code == 403
    assert (shown["principal"], shown["data"]) == (None, {"tried": True})


async def test_sign_out_everywhere_else(browser: Browser, site: Site) -> None:
    """The list of devices has only this one then; the other is signed out on each replica."""
    phone = site.browser()
    phone.url = site.b.url
    async with phone._client:
        await phone.do("sign-in", name="alice", device="phone")
        await browser.do("sign-in", name="alice", device="laptop")
        assert (await phone.do("devices"))["devices"] == ["laptop", "phone"]

        await browser.do("sign-out-elsewhere")

        assert (await browser.do("devices"))["devices"] == ["laptop"]
        assert (await phone.do("show"))["principal"] is None
        assert phone.cookie is None
    await browser.do("sign-out")
    assert browser.cookie is None


async def test_websocket_saves(browser: Browser) -> None:
    """The change is in the store while the connection is open."""
    await browser.do("set", a=1)
    async with browser.chat() as chat:
        await chat.send("hello")
        assert await chat.recv() == "saved"
        assert (await browser.do("show"))["data"] == {"a": 1, "said": "hello"}


async def test_websocket_of_another_site_is_refused(browser: Browser) -> None:
    """A browser would send the cookie with it."""
    await browser.do("set", a=1)
    with pytest.raises(websockets.InvalidStatus) as refused:
        async with browser.chat(origin="https://evil.example"):
            pass
    assert refused.value.response.status_code == 403


async def test_session_survives_a_killed_replica(browser: Browser, site: Site) -> None:
    """The next request goes to another replica."""
    with ExitStack() as stack:
        doomed = serve(stack, site.framework, site.store)
        browser.url = doomed.url
        await browser.do("sign-in", name="alice", device="laptop")
        await browser.do("set", a=1)
        doomed.kill()
        with pytest.raises(httpx.TransportError):
            await browser.do("show")

        browser.url = site.b.url
        shown = await browser.do("show")

    assert (shown["principal"], shown["data"]) == ("alice", {"a": 1})
