"""The actions on Starlette."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket

from aiosessions.asgi import SessionMiddleware, get_session
from tests.web.apps.actions import TRANSPORT, act, make_sessions


def refuse() -> Exception:
    """The exception of Starlette for the status 403."""
    return HTTPException(403)


def create_app() -> Any:
    """The application on Starlette."""
    sessions = make_sessions()

    @asynccontextmanager
    async def lifespan(_: object) -> AsyncIterator[None]:
        async with sessions.storage, sessions:
            yield

    async def action(request: Request) -> Response:
        name, argument = request.path_params["name"], await request.json()
        web = get_session(request)
        return JSONResponse(await act(name, argument, request.session, web, sessions, refuse))

    async def plain(_: Request) -> Response:
        return PlainTextResponse("plain")

    async def chat(websocket: WebSocket) -> None:
        await websocket.accept()
        async for text in websocket.iter_text():
            websocket.session["said"] = text
            await get_session(websocket).save()
            await websocket.send_text("saved")

    app = Starlette(
        routes=[
            Route("/plain", plain),
            Route("/{name}", action, methods=["POST"]),
            WebSocketRoute("/chat", chat),
        ],
        lifespan=lifespan,
    )
    app.add_middleware(SessionMiddleware, sessions=sessions, transport=TRANSPORT)
    return app
