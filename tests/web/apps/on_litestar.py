"""The actions on Litestar."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from litestar import Litestar, Request, WebSocket, get, post, websocket
from litestar.exceptions import PermissionDeniedException
from litestar.middleware import DefineMiddleware
from litestar.params import FromPath

from aiosessions.asgi import SessionMiddleware, get_session
from tests.web.apps.actions import TRANSPORT, Data, act, make_sessions


def refuse() -> Exception:
    """The exception of Litestar for the status 403."""
    return PermissionDeniedException()


def create_app() -> Any:
    """The application on Litestar."""
    sessions = make_sessions()

    @asynccontextmanager
    async def lifespan(_: object) -> AsyncIterator[None]:
        async with sessions.storage, sessions:
            yield

    @get("/plain")
    async def plain() -> str:
        return "plain"

    @post("/{name:str}", status_code=200)
    async def action(name: FromPath[str], request: Request[Any, Any, Any]) -> Data:
        body = await request.json()
        return await act(name, body, request.session, get_session(request), sessions, refuse)

    @websocket("/chat")
    async def chat(socket: WebSocket[Any, Any, Any]) -> None:
        await socket.accept()
        async for text in socket.iter_data(mode="text"):
            socket.session["said"] = text
            await get_session(socket).save()
            await socket.send_text("saved")

    middleware = DefineMiddleware(
        SessionMiddleware,  # type: ignore[arg-type] # Litestar's scopes are typed dicts
        sessions=sessions,
        transport=TRANSPORT,
    )
    return Litestar([plain, action, chat], middleware=[middleware], lifespan=[lifespan])
