"""Answers of the middleware itself, and the headers that it adds to those of the application."""

from collections.abc import Awaitable, Callable, Iterable, MutableMapping, Sequence
from typing import Any, Final

from ..errors import SessionConflict, SessionError, SessionNotFound

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
Headers = Sequence[tuple[bytes, bytes]]

# https://www.iana.org/assignments/websocket/websocket.xhtml#close-code-number
POLICY_VIOLATION: Final = 1008
_TRY_AGAIN_LATER: Final = 1013
_TEXTS: Final = {
    409: "the session was changed by another request; try again",
    503: "the session cannot be loaded or stored now; try again",
}
_DEFAULT_PORTS: Final = {"http": ":80", "https": ":443"}


def status_of(error: SessionError) -> int:
    """The status for an error: that of a conflict if another request has deleted the session."""
    return SessionConflict.status if isinstance(error, SessionNotFound) else error.status


async def fail(scope: Scope, send: Send, status: int) -> None:
    """Answer for an error of the session."""
    await refuse(scope, send, status, _TEXTS.get(status, "the session cannot be read or stored"))


async def refuse(scope: Scope, send: Send, status: int, text: str) -> None:
    """Answer with a status, before the head has left."""
    prefix = "http"
    if scope["type"] == "websocket":
        if "websocket.http.response" not in (scope.get("extensions") or {}):
            code = _TRY_AGAIN_LATER if status == 503 else POLICY_VIOLATION
            await send({"type": "websocket.close", "code": code, "reason": text})
            return
        prefix = "websocket.http"
    body = text.encode()
    headers = [
        (b"content-type", b"text/plain; charset=utf-8"),
        (b"content-length", b"%d" % len(body)),
        (b"cache-control", b"no-store"),
    ]
    if status == 503:
        headers.append((b"retry-after", b"1"))
    await send({"type": f"{prefix}.response.start", "status": status, "headers": headers})
    await send({"type": f"{prefix}.response.body", "body": body})


def merged(headers: Iterable[Any], own: Headers, vary: str) -> list[tuple[bytes, bytes]]:
    """The headers of a response that depends on the session.

    Args:
        headers: The headers of the application.
        own: The headers that give the client an id, or take it away.
        vary: The request header that holds the id.
    """
    # https://www.rfc-editor.org/rfc/rfc9111#section-7.3: caches store a Set-Cookie like any header
    theirs = [(bytes(name), bytes(value)) for name, value in headers]
    policy = _tokens(theirs, b"cache-control")
    result = [*theirs, *own]
    if own and not policy & {b"no-store", b"private"}:
        result = [each for each in result if each[0].lower() != b"cache-control"]
        result.append((b"cache-control", b"no-store"))
    elif not policy:
        result.append((b"cache-control", b"private"))
    if not _tokens(theirs, b"vary") & {b"*", vary.lower().encode()}:
        result.append((b"vary", vary.encode()))
    return result


def is_same_site(headers: Headers, origins: frozenset[str]) -> bool:
    """Whether a request for a WebSocket comes from this host or from an allowed origin."""
    found = dict(headers)
    origin = found.get(b"origin", b"").decode("latin-1").lower()
    if not origin or origin in origins:
        return True  # programs that are not browsers send no origin
    scheme, _, place = origin.partition("://")
    host = found.get(b"host", b"").decode("latin-1").lower()
    port = _DEFAULT_PORTS.get(scheme, "")
    # The scheme is not compared, because a proxy may have ended TLS.
    return bool(place) and place.removesuffix(port) == host.removesuffix(port)


def _tokens(headers: Headers, name: bytes) -> set[bytes]:
    """The members of a list in a header, without their arguments."""
    return {
        token.partition(b"=")[0].strip().lower()
        for each, value in headers
        if each.lower() == name
        for token in value.split(b",")
    }
