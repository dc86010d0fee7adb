"""Tasks of one request that use the session at the same time, and the end of the keep-alive."""

import asyncio
from typing import Any

import pytest

from aiosessions import LocalStorage, Session, SessionManager, When
from aiosessions.asgi import SessionMiddleware, get_session


class _Slow(LocalStorage[Any]):
    """As over a network: a write takes effect before its caller learns of it."""

    async def store(self, session: Session[Any], *, when: When = When.ALWAYS) -> None:
        await super().store(session, when=when)
        await asyncio.sleep(0.02)


async def _ask(app: Any, id: str) -> list[Any]:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "headers": [(b"cookie", b"session=" + id.encode())], "path": "/"}
    await app(scope, asyncio.Event().wait, send)
    return sent


def _double(session: Session[Any]) -> None:
    session.data["x"] *= 2


@pytest.mark.parametrize("way", ["save", "mutate"])
async def test_a_change_during_a_save_of_another_task_is_stored(way: str) -> None:
    """A change between a write and its reply is not taken for a stored one."""
    sessions = SessionManager(_Slow(ttl=60))
    stored = await sessions.create(data={"x": 0})

    async def application(scope: Any, _receive: Any, send: Any) -> None:
        session = get_session(scope)
        scope["session"]["x"] = 1

        async def other() -> None:
            await asyncio.sleep(0.01)
            scope["session"]["y"] = 2

        mine = session.save() if way == "save" else session.mutate(_double)
        await asyncio.gather(mine, other())
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body"})

    await _ask(SessionMiddleware(application, sessions), stored.id)
    assert (await sessions.get(stored.id)).data == {"x": 1 if way == "save" else 2, "y": 2}


async def test_two_tasks_save_a_new_session() -> None:
    """Both saves succeed, and there is one session."""
    sessions = SessionManager(LocalStorage[Any](ttl=60))

    async def application(scope: Any, _receive: Any, send: Any) -> None:
        async def one(key: str) -> None:
            scope["session"][key] = 1
            await get_session(scope).save()

        await asyncio.gather(one("x"), one("y"))
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body"})

    head, _ = await _ask(SessionMiddleware(application, sessions), "unknown")
    id = dict(head["headers"])[b"set-cookie"].decode().partition("=")[2].partition(";")[0]
    assert (await sessions.get(id)).data == {"x": 1, "y": 1}


async def test_work_after_the_last_part_of_a_response_is_not_cancelled() -> None:
    """The keep-alive ends with the response."""
    sessions = SessionManager(LocalStorage[Any](ttl=60))
    stored, done = await sessions.create(data={"x": 0}), []

    async def application(_scope: Any, _receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"1", "more_body": True})
        await send({"type": "http.response.body"})
        await sessions.delete(stored.id)
        await asyncio.sleep(0.1)
        done.append("background task")

    await _ask(SessionMiddleware(application, sessions, keep_alive=0.01), stored.id)
    assert done
