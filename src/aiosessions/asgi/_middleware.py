"""The middleware: it carries out the decisions of `_decision`, and answers for errors.

The order of one request: read the id, load the session, call the application, and when the head of
the response leaves, decide, store and add the headers.
"""

import logging
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from datetime import UTC, datetime, timedelta
from typing import Any, Final, Generic, Literal, cast

import anyio

from ..errors import CorruptSession, SessionConflict, StorageUnavailable
from ..manager import SessionManager
from ..session import D, session_digest
from ..storage import milliseconds
from ._decision import Outcome
from ._transport import CookieTransport, Transport
from ._web import SessionMapping, WebSession

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_KEY: Final = "aiosessions.session"
_POLICY_VIOLATION: Final = 1008  # https://www.rfc-editor.org/rfc/rfc6455#section-7.4.1
_TRY_AGAIN_LATER: Final = 1013
_log = logging.getLogger("aiosessions")


def get_session(request: Any) -> WebSession[Any]:
    """Return the session of a request, of a WebSocket, or of an ASGI scope.

    Raises:
        RuntimeError: `SessionMiddleware` is not around the application, or it has skipped the
            request.
    """
    scope = request if isinstance(request, MutableMapping) else getattr(request, "scope", {})
    try:
        return cast("WebSession[Any]", scope[_KEY])
    except KeyError:
        message = "there is no session: is SessionMiddleware around this application?"
        raise RuntimeError(message) from None


class SessionMiddleware(Generic[D]):
    """Sessions for an ASGI application (https://asgi.readthedocs.io).

    `scope["session"]` is a mapping over the session's data: `request.session` in Starlette, FastAPI
    and Litestar. `get_session(request)` is the session itself.

    Args:
        app: The application.
        sessions: The manager of the sessions. The application enters and leaves it.
        transport: The way of the id between the client and the application.
        kind: The kind of new sessions.
        empty: Makes the data of a new session.
        lazy: Load the session not before the application awaits `get_session(request).load()`.
        skip: Tells for a scope whether to leave the request alone, such as one for a static file.
        on_conflict: "merge": set the changed parts again in the fresh session. "error": answer with
            409.
        on_corrupt: "error": answer with 500. "fresh": go on with an empty session.
        origins: Origins of other sites that may open a WebSocket, such as "https://example.com".
        keep_alive: The time after which a WebSocket or a stream renews its session and looks
            whether it was deleted.

    Raises:
        ValueError, TypeError: A setting is wrong.
    """

    def __init__(
        self,
        app: App,
        sessions: SessionManager[D],
        *,
        transport: Transport | None = None,
        kind: str = "web",
        empty: Callable[[], Any] = dict,
        lazy: bool = False,
        skip: Callable[[Scope], bool] | None = None,
        on_conflict: Literal["merge", "error"] = "merge",
        on_corrupt: Literal["error", "fresh"] = "error",
        origins: Collection[str] = (),
        keep_alive: float | timedelta = 60.0,
    ) -> None:
        if on_conflict not in ("merge", "error"):
            raise ValueError(f'on_conflict is "merge" or "error", not {on_conflict!r}')
        if on_corrupt not in ("error", "fresh"):
            raise ValueError(f'on_corrupt is "error" or "fresh", not {on_corrupt!r}')
        if not isinstance(sessions, SessionManager):
            raise TypeError(f"sessions is a SessionManager, not {type(sessions).__name__}")
        self._app = app
        self._sessions = sessions
        self._transport = CookieTransport() if transport is None else transport
        self._kind = kind
        self._empty = empty
        self._lazy = lazy
        self._skip = skip
        self._on_conflict: Literal["merge", "error"] = on_conflict
        self._starts_fresh = on_corrupt == "fresh"
        self._origins = frozenset(origins)
        self._keep_alive = milliseconds(keep_alive, "keep_alive") / 1000

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Call the application with a session."""
        if scope["type"] not in ("http", "websocket") or (self._skip and self._skip(scope)):
            await self._app(scope, receive, send)
            return
        answer = _Answer(scope, receive, send)
        if scope["type"] == "websocket" and not self._may_open(scope):
            await answer.refuse(403, "the origin may not open this WebSocket")
            return
        presented = self._transport.read(scope["headers"])
        web = self._session(presented)
        scope[_KEY], scope["session"] = web, SessionMapping(web)
        if not self._lazy:
            try:
                await web.load()
            except StorageUnavailable as error:
                await answer.fail(error)
                return
            except CorruptSession as error:
                _log.error("session %s: %s", session_digest(presented or "")[:8], error)
                if not self._starts_fresh:
                    await answer.fail(error)
                    return
                web = self._session(None)
                scope[_KEY], scope["session"] = web, SessionMapping(web)
                await web.load()
        await _Exchange(self._app, web, self._transport, self._keep_alive, answer).run()

    def _session(self, presented: str | None) -> WebSession[D]:
        storage = self._sessions.storage
        return WebSession(
            self._sessions,
            presented,
            kind=self._kind,
            empty=self._empty,
            ttl=getattr(storage, "ttl", None),
            on_conflict=self._on_conflict,
            now=lambda: datetime.now(UTC),
        )

    def _may_open(self, scope: Scope) -> bool:
        """Whether a WebSocket comes from this site; browsers send cookies from every site."""
        if not self._transport.ambient:
            return True
        headers = dict(scope["headers"])
        origin = headers.get(b"origin", b"").decode("latin-1")
        if not origin or origin in self._origins:
            return True  # programs that are not browsers send none
        host: str = headers.get(b"host", b"").decode("latin-1")
        return origin.partition("://")[2] == host


class _Answer:
    """Answers in place of the application."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scope, self.receive, self.send = scope, receive, send
        self.is_websocket = scope["type"] == "websocket"

    async def fail(self, error: Exception) -> None:
        """Answer with the status of an error."""
        status = getattr(error, "status", 500)
        texts = {409: "the session was changed by another request; try again"}
        texts[503] = "the session cannot be loaded or stored now; try again"
        await self.refuse(status, texts.get(status, "the session cannot be read"))

    async def refuse(self, status: int, text: str) -> None:
        """Answer with a status, before the head has left."""
        headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"cache-control", b"no-store")]
        if status == 503:
            headers.append((b"retry-after", b"1"))
        body = text.encode()
        headers.append((b"content-length", b"%d" % len(body)))
        prefix = "http"
        if self.is_websocket:
            if "websocket.http.response" not in self.scope.get("extensions", {}):
                code = _TRY_AGAIN_LATER if status == 503 else _POLICY_VIOLATION
                await self.send({"type": "websocket.close", "code": code, "reason": text})
                return
            prefix = "websocket.http"
        await self.send({"type": f"{prefix}.response.start", "status": status, "headers": headers})
        await self.send({"type": f"{prefix}.response.body", "body": body})


class _Exchange(Generic[D]):
    """One request with its response, or one WebSocket."""

    def __init__(
        self,
        app: App,
        web: WebSession[D],
        transport: Transport,
        keep_alive: float,
        answer: _Answer,
    ) -> None:
        self._app = app
        self._web = web
        self._transport = transport
        self._interval = keep_alive
        self._answer = answer
        self._started = self._replaced = self._revoked = self._kept_alive = False

    async def run(self) -> None:
        """Call the application."""
        failure: Exception | None = None
        async with anyio.create_task_group() as self._group:
            try:
                await self._app(self._answer.scope, self._answer.receive, self._send)
            except Exception as error:  # noqa: BLE001 - raised below, not in a group
                failure = error
            self._group.cancel_scope.cancel()
        if self._revoked and self._answer.is_websocket:
            close = {"type": "websocket.close", "code": _POLICY_VIOLATION, "reason": "signed out"}
            await self._answer.send(close)
        if failure is not None:
            await self._finish(500, broken=True)
            raise failure
        if self._answer.is_websocket and not self._revoked:
            await self._web.save()
        elif self._started:
            self._web.check_unchanged()

    async def _send(self, message: Message) -> None:
        if self._replaced:
            return
        kind = message["type"]
        if kind in ("http.response.start", "websocket.accept", "websocket.http.response.start"):
            try:
                added = await self._finish(message.get("status", 101))
            except (SessionConflict, StorageUnavailable) as error:
                self._replaced = True
                await self._answer.fail(error)
                return
            message = {**message, "headers": _merged(message.get("headers", ()), added)}
            self._started = True
            self._web.head_leaves()
        if kind == "websocket.accept" or message.get("more_body"):
            self._start_keeping_alive()
        elif kind == "websocket.close" and self._started:
            await self._web.save()
        await self._answer.send(message)

    async def _finish(self, status: int, *, broken: bool = False) -> list[tuple[bytes, bytes]]:
        """Decide and store; return the headers to add."""
        web = self._web
        self._take_replacement()
        if self._started:
            return []
        outcome = web.decide(status, broken=broken)
        await web.carry_out(outcome, rights=status < 400)
        headers: list[tuple[bytes, bytes]] = []
        session = web.session
        if session is not None and (web.has_news or outcome is Outcome.ISSUE):
            headers += self._transport.issue(session.id, web.max_age())
        elif session is None and web.is_unknown:
            headers += self._transport.clear()
        if headers:
            headers.append((b"cache-control", b"no-store"))
        elif web.accessed:
            headers.append((b"cache-control", b"private"))
        if headers:
            headers.append((b"vary", self._transport.vary.encode()))
        return headers

    def _take_replacement(self) -> None:
        """Take over a mapping that the application has put in place of `scope["session"]`."""
        found = self._answer.scope.get("session")
        if isinstance(found, SessionMapping) or not self._web.is_loaded:
            return
        self._web.data = cast("D", dict(found) if isinstance(found, dict) else {})
        self._answer.scope["session"] = SessionMapping(self._web)

    def _start_keeping_alive(self) -> None:
        if not self._kept_alive and self._web.session is not None:
            self._kept_alive = True
            self._group.start_soon(self._keep_alive)

    async def _keep_alive(self) -> None:
        while True:
            await anyio.sleep(self._interval)
            try:
                alive = await self._web.is_alive()
            except StorageUnavailable:
                continue  # an outage is not a revocation
            if not alive:
                self._revoked = True
                self._group.cancel_scope.cancel()
                return


def _merged(headers: Any, added: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Add headers; a `Vary` or `Cache-Control` of the application stays."""
    merged = [(bytes(name), bytes(value)) for name, value in headers]
    names = {name.lower() for name, _ in merged}
    for name, value in added:
        if name == b"cache-control" and name in names:
            continue
        merged.append((name, value))
    return merged
