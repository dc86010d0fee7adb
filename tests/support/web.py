"""A client for ASGI applications: it keeps the session's cookie, and needs no server."""

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import anyio

from aiosessions import SessionManager
from aiosessions.asgi import SessionMiddleware, WebSession, get_session

Handler = Callable[[WebSession[Any]], Any]
"""A page. It may return a status, and may be a coroutine function."""
Headers = list[tuple[bytes, bytes]]


@dataclass
class Answer:
    """A response, or the messages that a WebSocket has got."""

    messages: list[dict[str, Any]] = field(default_factory=list)

    @property
    def status(self) -> int:
        """The status; 0 without a head."""
        return next((each["status"] for each in self.messages if "status" in each), 0)

    def all(self, name: str) -> list[str]:
        """The values of a header."""
        heads = (each.get("headers", ()) for each in self.messages)
        wanted = name.encode()
        return [value.decode() for head in heads for key, value in head if key.lower() == wanted]


def page(handler: Handler, headers: Headers) -> Any:
    """An application with one page."""

    async def app(scope: Any, _receive: Any, send: Any) -> None:
        status = handler(get_session(scope))
        if inspect.isawaitable(status):
            status = await status
        head = {"type": "http.response.start", "status": status or 200, "headers": headers}
        await send(head)
        await send({"type": "http.response.body", "body": b"text"})

    return app


class Client:
    """A browser with one cookie.

    Args:
        sessions: The manager of the sessions.
        settings: Settings of the middleware.
    """

    def __init__(self, sessions: SessionManager[Any], **settings: Any) -> None:
        self.sessions = sessions
        self.settings = settings
        self.cookie: str | None = None

    async def get(self, handler: Handler, headers: Headers | None = None) -> Answer:
        """Request a page."""
        return await self.call(page(handler, headers or []))

    async def call(
        self, app: Any, *, answer: Answer | None = None, type: str = "http", **scope: Any
    ) -> Answer:
        """Send a request to an application; after an exception, `answer` has the messages."""
        full, answer = self.scope(type, **scope), answer or Answer()
        try:
            await SessionMiddleware(app, self.sessions, **self.settings)(
                full, self.receive(()), answer_into(answer)
            )
        finally:
            self.learn(answer)
        return answer

    def scope(self, type: str = "http", *, headers: Iterable[Any] = (), **more: Any) -> Any:
        """The scope of a request with the cookie."""
        own = [] if self.cookie is None else [(b"cookie", b"session=" + self.cookie.encode())]
        return {"type": type, "path": "/", "headers": [*own, *headers], **more}

    def receive(self, messages: Iterable[dict[str, Any]]) -> Any:
        """A receive function with some messages; then the client waits."""
        left = list(messages)

        async def receive() -> Any:
            if not left:
                await anyio.sleep_forever()
            return left.pop(0)

        return receive

    def learn(self, answer: Answer) -> None:
        """Take over the cookie of an answer."""
        for line in answer.all("set-cookie"):
            name, _, value = line.partition(";")[0].partition("=")
            if name == "session":
                self.cookie = value or None

    def copy(self) -> "Client":
        """A second tab."""
        other = Client(self.sessions, **self.settings)
        other.cookie = self.cookie
        return other

    async def data(self) -> Any:
        """The data and the principal that the next request finds."""
        found: list[Any] = []
        await self.copy().get(lambda session: found.extend((session.data, session.principal)))
        return tuple(found)


def answer_into(answer: Answer) -> Any:
    """A send function that collects the messages."""

    async def send(message: Any) -> None:
        answer.messages.append(message)

    return send


def setting(**items: Any) -> Handler:
    """A page that sets keys."""

    def handler(session: WebSession[Any]) -> None:
        session.data.update(items)

    return handler


def signing_in(name: str | None, status: int = 200) -> Handler:
    """A page that sets the principal."""

    def handler(session: WebSession[Any]) -> int:
        session.principal = name
        return status

    return handler


def mapping(change: Callable[[Any], object]) -> Any:
    """An application that changes `scope["session"]`."""

    async def app(scope: Any, _receive: Any, send: Any) -> None:
        result = change(scope["session"])
        if inspect.isawaitable(result):
            await result
        await send({"type": "http.response.start", "status": 200})
        await send({"type": "http.response.body"})

    return app
