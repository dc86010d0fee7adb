"""The middleware: its settings, and the load of the session before the application runs."""

from collections.abc import Callable, Collection, MutableMapping
from datetime import timedelta
from typing import Any, Final, Generic, Literal, cast

from ..errors import InvalidSession, SessionError
from ..manager import SessionManager
from ..session import D, Session
from ..storage import milliseconds
from ._answers import App, Receive, Scope, Send, fail, is_same_site, refuse
from ._exchange import Exchange
from ._mapping import SessionMapping
from ._operations import Settings
from ._transport import CookieTransport, Transport
from ._web import WebSession
from ._work import Work

_KEY: Final = "aiosessions.session"


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
        transport: How the id travels between the client and the application; by default
            `CookieTransport()`.
        kind: The kind of new sessions.
        empty: A function that makes the data of a new session. A codec with a data type needs one
            that makes data of this type.
        lazy: Whether the application loads the session, with `await get_session(request).load()`.
            By default the middleware loads it, if the client presents an id.
        skip: A function of the scope that returns True for requests to leave alone, such as those
            for static files.
        on_conflict: "merge": set the changed parts again in the fresh session, and answer with 409
            if that would lose a change. "error": answer each conflict with 409.
        on_corrupt: "error": answer with 500. "fresh": go on with an empty session.
        origins: Origins of other sites that may open a WebSocket, such as "https://example.com".
        keep_alive: The time after which a WebSocket or a stream renews its session and ends if
            the session is gone: seconds or a timedelta. At most half a TTL is used.

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
        if isinstance(origins, str):
            raise TypeError("origins is a collection of strings, not a string")
        if skip is not None and not callable(skip):
            raise TypeError(f"skip is a function of the scope, not {type(skip).__name__}")
        if isinstance(transport, type) or not hasattr(transport or CookieTransport(), "issue"):
            raise TypeError(f"transport is like CookieTransport(), not {transport!r}")
        for origin in origins:
            if origin != "null" and ("://" not in origin or origin.endswith("/")):
                raise ValueError(f'an origin is like "https://example.com", not {origin!r}')
        _check_empty(sessions, kind, empty)
        self._app = app
        self._transport = CookieTransport() if transport is None else transport
        self._settings: Settings[D] = Settings(
            sessions,
            kind,
            empty,
            merges=on_conflict == "merge",
            starts_fresh=on_corrupt == "fresh",
            slides=self._transport.ambient,
        )
        self._lazy = lazy
        self._skip = skip
        self._origins = frozenset(origin.lower() for origin in origins)
        self._keep_alive, ttl = milliseconds(keep_alive, "keep_alive") / 1000, self._settings.ttl
        if ttl is not None:
            # A look may meet a copy of a `NearCache` that is nearly stale, and renew nothing.
            staleness: float = getattr(sessions.storage, "max_staleness", 0.0)
            self._keep_alive = min(self._keep_alive, (ttl - staleness) / 2)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Call the application with a session."""
        if scope["type"] not in ("http", "websocket") or (self._skip and self._skip(scope)):
            await self._app(scope, receive, send)
            return
        headers, transport = scope["headers"], self._transport
        # Browsers let every site open WebSockets to this one, and send the cookie.
        is_checked = scope["type"] == "websocket" and transport.ambient
        if is_checked and not is_same_site(headers, self._origins):
            await refuse(scope, send, 403, "the origin may not open this WebSocket")
            return
        work = Work(self._settings, transport.read(headers))
        if not self._lazy:
            try:
                await work.load()
            except SessionError as error:
                await fail(scope, send, error.status)
                return
        outer = {key: scope[key] for key in (_KEY, "session") if key in scope}
        scope[_KEY], scope["session"] = WebSession(work), SessionMapping(work)
        try:
            server = scope, receive, send
            await Exchange(self._app, work, transport, self._keep_alive, server).run()
        finally:
            scope.update(outer)  # of a middleware around this one


def _check_empty(sessions: SessionManager[Any], kind: str, empty: Callable[[], Any]) -> None:
    """Check that the codec takes the data of a new session."""
    if not callable(empty):
        raise TypeError(f"empty is a function that makes data, not {type(empty).__name__}")
    codec = getattr(sessions.storage, "codec", None)
    if codec is None:
        return
    data = empty()
    try:
        codec.encode(Session(id="x", kind=kind, data=data))
    except InvalidSession as error:
        message = f"the codec refuses the data of a new session, which is a {type(data).__name__}"
        raise TypeError(f"{message}; pass empty=: {error}") from None
