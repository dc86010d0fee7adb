"""One small web application on each session library, served by uvicorn in a separate process.

Each library is used as its documentation shows, with a TTL of an hour. The same application runs
without sessions on each framework, for comparison.
"""

# ruff: noqa: PLC0415 - a missing library must not disturb the others

import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, Final, NamedTuple

from .workload import PREFIX, TTL

_SECONDS: Final = int(TTL)


class Visit:
    """One request, with the session that `request.session` offers."""

    def __init__(self, request: Any) -> None:
        self.request = request

    async def session(self) -> Any:
        """The mapping of the session."""
        return self.request.session

    def user(self, session: Any) -> Any:
        """The user who is signed in."""
        return session.get("user_id")

    def sign_in(self, session: Any, user: str) -> None:
        """Sign a user in."""
        session["user_id"] = user


class Alone(Visit):
    """A request without a session."""

    async def session(self) -> Any:
        """A new mapping, which is not stored."""
        return {}


async def page(action: str, visit: Visit, value: str, work: float) -> Any:
    """Answer a request, which works for some seconds before it changes the session."""
    if action == "untouched":
        return action
    session = await visit.session()
    items = session.get("items", []) if action in ("add", "show") else []
    if action in ("read", "show"):
        return {"user": visit.user(session), "items": items}
    await asyncio.sleep(work)
    if action == "change":
        session["counter"] = session.get("counter", 0) + 1
    elif action == "sign-in":
        visit.sign_in(session, value)
    elif action == "add":
        session["items"] = [*items, value]
    elif action == "append":  # the library repeats it after a conflict
        await visit.request.scope["append"](value)
    else:
        session[action] = value
    return action


def _starlette(visit: Callable[[Any], Visit], *middleware: Any, lifespan: Any = None) -> Any:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import JSONResponse
    from starlette.routing import Route

    async def endpoint(request: Request) -> JSONResponse:
        action, query = request.path_params["action"], request.query_params
        work = float(query.get("work", 0))
        return JSONResponse(await page(action, visit(request), query.get("value", ""), work))

    return Starlette(
        routes=[Route("/{action}", endpoint)], middleware=middleware, lifespan=lifespan
    )


def _starlette_cookie() -> Any:
    from starlette.middleware import Middleware
    from starlette.middleware.sessions import SessionMiddleware

    secure: Any = {"secret_key": "x" * 32, "max_age": _SECONDS, "https_only": True}
    return _starlette(Visit, Middleware(SessionMiddleware, **secure))


def _starsessions(url: str) -> Any:
    from starlette.middleware import Middleware
    from starsessions import SessionAutoloadMiddleware, SessionMiddleware, regenerate_session_id
    from starsessions.stores.redis import RedisStore

    class NewId(Visit):
        def sign_in(self, session: Any, user: str) -> None:
            super().sign_in(session, user)
            regenerate_session_id(self.request)

    store = RedisStore(url, prefix=f"{PREFIX}starsessions:")
    sessions = Middleware(SessionMiddleware, store=store, lifetime=_SECONDS, rolling=True)
    return _starlette(NewId, sessions, Middleware(SessionAutoloadMiddleware))


def _aiosessions(url: str, *, lazy: bool = False) -> Any:
    from starlette.middleware import Middleware

    from aiosessions import RedisStorage, SessionManager
    from aiosessions.asgi import SessionMiddleware, get_session

    class Principal(Visit):
        async def session(self) -> Any:
            web = await get_session(self.request).load()

            async def append(item: str) -> None:
                await web.mutate(lambda stored: stored.data.setdefault("items", []).append(item))

            self.request.scope["append"] = append
            return self.request.session

        def user(self, _: Any) -> Any:
            return get_session(self.request).principal

        def sign_in(self, _: Any, user: str) -> None:
            get_session(self.request).principal = user

    storage = RedisStorage[Any].from_url(url, ttl=TTL, key_prefix=PREFIX)
    sessions = SessionManager(storage)

    @asynccontextmanager
    async def lifespan(_: Any) -> AsyncIterator[None]:
        async with storage, sessions:
            yield

    middleware = Middleware(SessionMiddleware, sessions, lazy=lazy)
    return _starlette(Principal, middleware, lifespan=lifespan)


def _litestar(visit: Callable[[Any], Visit], **settings: Any) -> Any:
    import litestar

    @litestar.get("/{action:str}")
    async def endpoint(
        request: litestar.Request[Any, Any, Any], action: str, value: str = "", work: float = 0
    ) -> Any:
        return await page(action, visit(request), value, work)

    return litestar.Litestar([endpoint], logging_config=None, **settings)


def _litestar_sessions(url: str) -> Any:
    from litestar.middleware.session.server_side import ServerSideSessionConfig
    from litestar.stores.redis import RedisStore

    store = RedisStore.with_client(url, namespace=f"{PREFIX}litestar")
    sessions = ServerSideSessionConfig(max_age=_SECONDS, secure=True)
    return _litestar(Visit, middleware=[sessions.middleware], stores={"sessions": store})


def _fastapi(visit: Callable[[Any], Visit]) -> Any:
    from fastapi import FastAPI, Request

    app = FastAPI()

    @app.get("/{action}")
    async def endpoint(request: Request, action: str, value: str = "", work: float = 0) -> Any:
        return await page(action, visit(request), value, work)

    return app


def _fastapi_redis_sdk(url: str) -> Any:
    from redis_fastapi import FastAPIRedis, get_settings

    get_settings().url = url
    app = _fastapi(Visit)
    FastAPIRedis(app).lifespan().sessions(idle_ttl=_SECONDS, absolute_ttl=_SECONDS)
    return app


class App(NamedTuple):
    """An application: its maker, for the URL of a server, and its framework."""

    make: Callable[[str], Any]
    framework: str


OURS: Final = "aiosessions on Starlette"
OURS_LAZY: Final = f"{OURS}, lazy=True"
ALONE: Final[dict[str, Callable[[str], Any]]] = {
    "Starlette": lambda _: _starlette(Alone),
    "FastAPI": lambda _: _fastapi(Alone),
    "Litestar": lambda _: _litestar(Alone),
}
"""The application without sessions, by its framework."""

APPS: Final = {
    "Starlette's cookie": App(lambda _: _starlette_cookie(), "Starlette"),
    "starsessions on Starlette": App(_starsessions, "Starlette"),
    "Litestar's sessions": App(_litestar_sessions, "Litestar"),
    "fastapi-redis-sdk": App(_fastapi_redis_sdk, "FastAPI"),
    OURS: App(_aiosessions, "Starlette"),
    OURS_LAZY: App(lambda url: _aiosessions(url, lazy=True), "Starlette"),
}
"""The application with sessions. The names differ from those in `peers`."""

PACKAGES: Final = (
    *("starlette", "fastapi", "litestar", "starsessions", "fastapi-redis-sdk"),
    *("itsdangerous", "uvicorn", "httptools", "uvloop"),
)


@contextmanager
def served(name: str, url: str) -> Iterator[int]:
    """Serve an application in a separate process until the block ends; yields its port.

    Raises:
        ImportError: The application does not start. The process has printed the reason.
    """
    command = [sys.executable, "-m", __name__, name, url]
    with subprocess.Popen(  # noqa: S603 - this module
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        try:
            assert process.stdout is not None  # noqa: S101 - for the type checker
            line = process.stdout.readline()
            if not line:
                raise ImportError(f"the application on {name} does not start")
            yield int(line)
        finally:
            process.communicate()  # closes its input, which ends it


async def _serve(name: str, url: str) -> None:
    import uvicorn

    app = ALONE[name](url) if name in ALONE else APPS[name].make(url)
    # Connections stay open while other applications are measured.
    settings: Any = {"http": "httptools", "access_log": False, "timeout_keep_alive": 3_600}
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", **settings))
    # It has nothing to clean up, and a graceful end would take longer than most measurements.
    asyncio.get_running_loop().add_reader(sys.stdin, os._exit, 0)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        print(listener.getsockname()[1], flush=True)
        await server.serve(sockets=[listener])


if __name__ == "__main__":
    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(*sys.argv[1:]))
