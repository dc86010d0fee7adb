"""The FastAPI application of the README, on two replicas over HTTPS: twelve questions."""

import asyncio
import re
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from http.cookies import SimpleCookie
from typing import Any

import httpx
import pytest

from tests.docs.snippets import SERVER
from tests.support.replicas import ROOT, Certificate, replica
from tests.support.servers import Server

_README = (ROOT / "README.md").read_text("utf-8")
_SOURCES = re.findall(r"```python\n(.*?)```", _README, re.DOTALL)
(SOURCE,) = [source for source in _SOURCES if "FastAPI(" in source]
ITEMS = [f"item-{number}" for number in range(8)]


@dataclass(frozen=True)
class Shop:
    """Two replicas of the application, and their empty store."""

    urls: tuple[str, str]
    certificate: Certificate
    store: Server

    def browser(self, cookie: str | None = None) -> httpx.AsyncClient:
        """A client of the first replica, with a jar for cookies or with one fixed cookie."""
        headers = {} if cookie is None else {"Cookie": f"session={cookie}"}
        trust = self.certificate.trust
        return httpx.AsyncClient(base_url=self.urls[0], verify=trust, headers=headers, timeout=30)

    async def cart(self, cookie: str) -> httpx.Response:
        """The cart of the session in a cookie."""
        async with self.browser(cookie) as browser:
            return await browser.get("/cart")

    def stored(self) -> int:
        """The number of keys in the store."""
        with self.store.client() as client:
            return int(client.dbsize())


@pytest.fixture(scope="module")
def running_shop(valkey: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    """The text of the README as a program, served by two processes."""
    directory = tmp_path_factory.mktemp("shop")
    (directory / "shop.py").write_text(SOURCE.replace(SERVER, valkey.url), "utf-8")
    certificate = Certificate(directory)
    with ExitStack() as stack:
        a, b = (
            stack.enter_context(replica("shop:app", directory=directory, certificate=certificate))
            for _ in range(2)
        )
        yield Shop((a.url, b.url), certificate, valkey)


@pytest.fixture
def shop(running_shop: Shop) -> Shop:
    """The shop, with an empty store."""
    running_shop.store.flush()
    return running_shop


def test_app_has_at_most_twenty_lines() -> None:
    """Blank lines do not count."""
    assert len([line for line in SOURCE.splitlines() if line.strip()]) <= 20


async def cookie_has_flags(shop: Shop) -> None:
    """Secure, HttpOnly, SameSite, and Max-Age of the TTL."""
    async with shop.browser() as browser:
        response = await browser.post("/cart/tea")
    cookie = SimpleCookie(response.headers["set-cookie"])["session"]
    assert cookie["secure"] is True
    assert cookie["httponly"] is True
    assert cookie["samesite"] == "Lax"
    assert cookie["max-age"] == "1800"
    assert cookie["domain"] == ""
    assert cookie["path"] == "/"


async def sign_in_changes_the_id(shop: Shop) -> None:
    """The cart moves to the new id; the old id is not signed in."""
    async with shop.browser() as browser:
        await browser.post("/cart/tea")
        old = browser.cookies["session"]
        await browser.post("/sign-in/alice")
        assert browser.cookies["session"] != old
        cart = (await browser.get("/cart")).json()
    assert cart == {"principal": "alice", "items": ["tea"]}
    assert (await shop.cart(old)).json()["principal"] is None


async def planted_id_is_not_adopted(shop: Shop) -> None:
    """The server stores the session under another id."""
    planted = "A" * 43
    async with shop.browser(planted) as browser:
        response = await browser.post("/sign-in/alice")
    assert response.status_code == 200
    assert SimpleCookie(response.headers["set-cookie"])["session"].value != planted
    assert (await shop.cart(planted)).json() == {"principal": None, "items": []}


async def garbage_cookie_is_anonymous(shop: Shop) -> None:
    """No text in a cookie is an error."""
    for garbage in ("%00%ff", '"', "=;=", "a b", "{}", ""):
        response = await shop.cart(garbage)
        assert (response.status_code, response.json()["principal"]) == (200, None), garbage


async def long_cookie_is_anonymous(shop: Shop) -> None:
    """A value of 300 characters is longer than any id."""
    response = await shop.cart("x" * 300)
    assert (response.status_code, response.json()["principal"]) == (200, None)


async def stale_cookie_is_cleared(shop: Shop) -> None:
    """The browser forgets the id of an expired session."""
    async with shop.browser() as browser:
        await browser.post("/cart/tea")
        shop.store.age(1900)
        assert (await browser.get("/cart")).json()["items"] == []
        assert "session" not in browser.cookies


async def parallel_additions_all_arrive(shop: Shop) -> None:
    """Eight requests at once, on two replicas."""
    async with shop.browser() as browser:
        await browser.post("/cart/tea")
        urls = [f"{shop.urls[number % 2]}/cart/{item}" for number, item in enumerate(ITEMS)]
        responses = await asyncio.gather(*(browser.post(url) for url in urls))
        assert [response.status_code for response in responses] == [200] * 8
        assert {*(await browser.get("/cart")).json()["items"]} == {"tea", *ITEMS}


async def sign_out_ends_the_session(shop: Shop) -> None:
    """A copy of the cookie is anonymous, too."""
    async with shop.browser() as browser:
        await browser.post("/sign-in/alice")
        copy = browser.cookies["session"]
        await browser.post("/sign-out")
        assert "session" not in browser.cookies
    assert (await shop.cart(copy)).json()["principal"] is None


async def sign_in_races_with_additions(shop: Shop) -> None:
    """Every request with status 200 has its effect; an addition that is too late gets 409."""
    for _ in range(10):
        async with shop.browser() as browser:
            await browser.post("/cart/tea")
            urls = [f"{shop.urls[number % 2]}/cart/{item}" for number, item in enumerate(ITEMS)]
            urls.insert(4, f"{shop.urls[1]}/sign-in/alice")
            responses = await asyncio.gather(*(browser.post(url) for url in urls))
            statuses = dict(zip(urls, (each.status_code for each in responses), strict=True))
            assert {*statuses.values()} <= {200, 409}
            assert statuses.pop(urls[4]) == 200
            cart = (await browser.get("/cart")).json()
        assert cart["principal"] == "alice"
        assert {*cart["items"]} == {
            "tea",
            *(url.rpartition("/")[2] for url, status in statuses.items() if status == 200),
        }


async def bots_store_nothing(shop: Shop) -> None:
    """A hundred visits without a cookie."""
    async with shop.browser() as browser:
        for _ in range(100):
            response = await browser.get("/cart")
            assert "set-cookie" not in response.headers
    assert shop.stored() == 0


async def reading_writes_nothing(shop: Shop) -> None:
    """A request that reads costs one GETEX."""
    async with shop.browser() as browser:
        await browser.post("/cart/tea")
        with shop.store.client() as client:
            client.config_resetstat()
            for _ in range(10):
                await browser.get("/cart")
            statistics: Any = client.info("commandstats")
    calls = {name: each["calls"] for name, each in statistics.items() if "config" not in name}
    assert calls == {"cmdstat_getex": 10}


async def other_replica_sees_it_at_once(shop: Shop) -> None:
    """The next request finds the change on any replica."""
    async with shop.browser() as browser:
        for number, item in enumerate(ITEMS, start=1):
            await browser.post(f"/cart/{item}")
            cart = (await browser.get(f"{shop.urls[1]}/cart")).json()
            assert len(cart["items"]) == number


QUESTIONS: list[Callable[[Shop], Awaitable[None]]] = [
    cookie_has_flags,
    sign_in_changes_the_id,
    planted_id_is_not_adopted,
    garbage_cookie_is_anonymous,
    long_cookie_is_anonymous,
    stale_cookie_is_cleared,
    parallel_additions_all_arrive,
    sign_out_ends_the_session,
    sign_in_races_with_additions,
    bots_store_nothing,
    reading_writes_nothing,
    other_replica_sees_it_at_once,
]
assert len(QUESTIONS) == 12


@pytest.mark.parametrize(
    "question",
    QUESTIONS,
    ids=[f"{n} of 12: {each.__name__}" for n, each in enumerate(QUESTIONS, start=1)],
)
async def test_readme_app(question: Callable[[Shop], Awaitable[None]], shop: Shop) -> None:
    """Ask one of the twelve questions."""
    await question(shop)
