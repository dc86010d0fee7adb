"""The actions on FastAPI."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, HTTPException, Request, WebSocket

from aiosessions.asgi import SessionMiddleware, get_session
from tests.web.apps.actions import TRANSPORT, Data, act, make_sessions


def refuse() -> Exception:
    """The exception of FastAPI for the status 403."""
    return HTTPException(403)


def create_app() -> Any:
    """The application on FastAPI."""
    sessions = make_sessions()

    @asynccontextmanager
    async def lifespan(_: object) -> AsyncIterator[None]:
        async with sessions.storage, sessions:
            yield

    app = FastAPI(lifespan=lifespan)
    app.add_middleware(SessionMiddleware, sessions=sessions, transport=TRANSPORT)

    @app.get("/plain")
    async def plain() -> str:
        return "plain"

    @app.post("/{name}")
    async def action(name: str, argument: Data, request: Request) -> Data:
        return await act(name, argument, request.session, get_session(request), sessions, refuse)

    @app.websocket("/chat")
    async def chat(websocket: WebSocket) -> None:
        await websocket.accept()
        async for text in websocket.iter_text():
            websocket.session["said"] = text
            await get_session(websocket).save()
            await websocket.send_text("saved")

    return app
