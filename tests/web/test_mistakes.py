"""Mistakes of new users are errors, and re-authentication ends a stolen id."""

import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest

from aiosessions import LocalStorage, SessionManager
from aiosessions.asgi import SessionMiddleware, get_session

URL = "https://test"


async def call(application: Any, sessions: SessionManager[Any]) -> httpx.Response:
    """Send a request to an application with sessions."""
    transport = httpx.ASGITransport(
        SessionMiddleware(application, sessions), raise_app_exceptions=False
    )
    async with httpx.AsyncClient(transport=transport, base_url=URL) as client:
        return await client.get("/")


async def test_misspelt_attribute_is_an_error() -> None:
    """A sign-in with a misspelt name is not lost without a word."""
    failures: list[type[Exception]] = []

    async def application(scope: Any, _receive: Any, send: Any) -> None:
        targets: list[Any] = [get_session(scope), scope["session"]]
        for target in targets:
            try:
                target.princpal = "alice"
            except AttributeError as error:
                failures.append(type(error))
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body"})

    await call(application, SessionManager(LocalStorage(ttl=60)))
    assert failures == [AttributeError, AttributeError]


async def test_unencodable_data_is_answered_with_500() -> None:
    """The answer does not say that the session could only not be read."""

    async def application(scope: Any, _receive: Any, send: Any) -> None:
        scope["session"]["k"] = {1}
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body"})

    response = await call(application, SessionManager(LocalStorage(ttl=60)))
    assert (response.status_code, response.text) == (500, "the session cannot be read or stored")


@pytest.fixture
def fastapi_page() -> dict[str, Any]:
    """The names that the program of the page defines."""
    text = Path("docs/integrations/fastapi.md").read_text("utf-8")
    names: dict[str, Any] = {"__name__": "page"}
    exec("\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL)[:3]), names)  # noqa: S102
    return names


async def test_second_sign_in_ends_a_stolen_id(fastapi_page: dict[str, Any]) -> None:
    """The new id alone is freshly signed in."""
    storage = LocalStorage(ttl=60)
    transport = httpx.ASGITransport(fastapi_page["create_app"](storage))
    async with httpx.AsyncClient(transport=transport, base_url=URL) as victim:
        await victim.post("/sign-in/alice")
        stolen = victim.cookies["session"]
        sessions: SessionManager[Any] = SessionManager(storage)
        session = await sessions.get(stolen)
        session.metadata["signed_in"] = (datetime.now(UTC) - timedelta(hours=1)).isoformat()
        await sessions.save(session)
        thief = httpx.AsyncClient(
            transport=transport, base_url=URL, headers={"Cookie": f"session={stolen}"}
        )
        assert (await thief.post("/sign-out-elsewhere")).status_code == 401
        await victim.post("/sign-in/alice")
        assert (await thief.post("/sign-out-elsewhere")).status_code == 401


async def test_session_without_the_time_of_its_sign_in(fastapi_page: dict[str, Any]) -> None:
    """It is signed in, and not freshly."""
    storage = LocalStorage(ttl=60)
    session = await SessionManager(storage).create(data={}, principal="alice")
    transport = httpx.ASGITransport(fastapi_page["create_app"](storage))
    cookie = {"Cookie": f"session={session.id}"}
    async with httpx.AsyncClient(transport=transport, base_url=URL, headers=cookie) as client:
        assert (await client.get("/me")).status_code == 200
        assert (await client.post("/sign-out-elsewhere")).status_code == 401
