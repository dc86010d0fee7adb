"""The actions on Quart."""

from collections.abc import AsyncGenerator
from typing import Any

from quart import Quart, request, websocket
from werkzeug.exceptions import Forbidden

from aiosessions.asgi import SessionMiddleware, get_session
from tests.web.apps.actions import TRANSPORT, Data, act, make_sessions


def create_app() -> Any:
    """The application on Quart."""
    sessions = make_sessions()
    app = Quart(__name__)

    @app.while_serving
    async def lifespan() -> AsyncGenerator[None, None]:
        async with sessions.storage, sessions:
            yield

    @app.get("/plain")
    async def plain() -> str:
        return "plain"

    @app.post("/<name>")
    async def action(name: str) -> Data:
        web = get_session(request)
        argument = await request.get_json()
        data = request.scope["session"]  # type: ignore[typeddict-item]
        return await act(name, argument, data, web, sessions, Forbidden)

    @app.websocket("/chat")
    async def chat() -> None:
        while True:
            web = get_session(websocket)
            web.data["said"] = await websocket.receive()
            await web.save()
            await websocket.send("saved")

    app.asgi_app = SessionMiddleware(  # type: ignore[assignment] # it takes the place of a function
        app.asgi_app,  # type: ignore[arg-type]
        sessions,
        transport=TRANSPORT,
    )
    return app
