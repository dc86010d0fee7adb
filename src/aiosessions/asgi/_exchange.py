"""One request with its response, or one WebSocket.

The order: call the application, and when the head of its response leaves, decide, store and add the
headers. From then on, an HTTP response stores nothing, and a WebSocket stores at its end.
"""

import logging
from typing import Any, Generic

import anyio

from ..errors import (
    SessionConflict,
    SessionError,
    SessionNotFound,
    StorageClosed,
    StorageUnavailable,
)
from ..session import D
from ._answers import (
    POLICY_VIOLATION,
    App,
    Headers,
    Message,
    Receive,
    Scope,
    Send,
    fail,
    merged,
    status_of,
)
from ._mapping import SessionMapping
from ._transport import Transport
from ._work import Work

_HEADS = ("http.response.start", "websocket.accept", "websocket.http.response.start")
Server = tuple[Scope, Receive, Send]
_log = logging.getLogger("aiosessions")


class Exchange(Generic[D]):
    """A call of the application.

    Args:
        app: The application.
        work: The session.
        transport: The way of the id.
        keep_alive: The time between two looks at the session of a stream, in seconds.
        server: The scope and the two functions of the server.
    """

    def __init__(
        self, app: App, work: Work[D], transport: Transport, keep_alive: float, server: Server
    ) -> None:
        self._app = app
        self._work = work
        self._transport = transport
        self._interval = keep_alive
        self._scope, self._server_receive, self._server_send = server
        self._is_websocket = self._scope["type"] == "websocket"
        self._group: Any = None
        self._started = False  # the head has left
        self._accepted = False  # the WebSocket, by the application
        self._replaced = False  # by an answer of the middleware
        self._closed = False  # the WebSocket, by either side
        self._kept_alive = self._ended = False
        self._scope_of_looks = anyio.CancelScope()

    async def run(self) -> None:
        """Call the application."""
        failure: Exception | None = None
        if self._work.presented is None and not self._is_websocket:
            # There is nothing to keep alive, and a task group costs as much as a small application.
            failure = await self._call()
        else:
            async with anyio.create_task_group() as self._group:
                failure = await self._call()
                self._stop_keeping_alive()
        await self._end(failure)
        if failure is not None:
            raise failure

    async def _call(self) -> Exception | None:
        """Call the application, and return its exception: a task group would wrap it."""
        receive = self._receive if self._is_websocket else self._server_receive
        try:
            await self._app(self._scope, receive, self._send)
        except Exception as error:  # noqa: BLE001 - `run` raises it
            return error
        return None

    async def _end(self, failure: Exception | None) -> None:
        """Store the rest after the application has returned or raised."""
        if self._ended:  # by another client of this session
            if self._is_websocket and not self._closed:
                reason = "the session has ended"
                message = {"type": "websocket.close", "code": POLICY_VIOLATION, "reason": reason}
                await self._server_send(message)
            return
        if self._replaced:
            return
        if self._accepted and (failure is None or self._closed):
            self._take_replacement()
            await self._work.finish()
            return
        try:
            await self._work.settle()  # a deletion holds after every failure
        except SessionError as error:
            if failure is None:
                raise
            _log.warning("the session of a request that failed was not deleted: %s", error)
        if self._started:
            if failure is None:
                self._work.check_unchanged()
        elif isinstance(failure, SessionError):
            await fail(self._scope, self._server_send, status_of(failure))

    async def _receive(self) -> Message:
        if self._replaced:
            return {"type": "websocket.disconnect", "code": POLICY_VIOLATION}
        message = await self._server_receive()
        if message["type"] == "websocket.disconnect":
            self._closed = True
            self._stop_keeping_alive()
        return message

    async def _send(self, message: Message) -> None:
        kind = message["type"]
        if not self._started and kind in _HEADS and not self._replaced:
            # A WebSocket that is denied gets no rights, whatever the status of the denial.
            status = 403 if kind == "websocket.http.response.start" else message.get("status", 101)
            if await self._finish(status):
                message = self._with_headers(message)
                self._started = self._work.head_left = True
                self._accepted = kind == "websocket.accept"
            else:
                self._replaced = True
        if self._replaced:
            return
        if kind == "websocket.close":
            if self._accepted:
                self._take_replacement()
                await self._work.finish()
            self._closed = True
            self._stop_keeping_alive()
        elif self._accepted or message.get("more_body"):
            self._start_keeping_alive()
        elif kind.endswith("response.body"):
            self._stop_keeping_alive()  # what the application does afterwards is its own affair
        await self._server_send(message)

    async def _finish(self, status: int) -> bool:
        """Store for a response with this status; if that is impossible, answer in its place."""
        try:
            self._take_replacement()
            await self._work.finish(status)
        except (SessionConflict, SessionNotFound, StorageUnavailable, StorageClosed) as error:
            instead = status_of(error)
        else:
            # The framework has made 500 of an error of the session, which has a better status.
            instead = self._work.error_status if status == 500 else 0
        if instead:
            await fail(self._scope, self._server_send, instead)
        return not instead

    def _with_headers(self, message: Message) -> Message:
        work = self._work
        own: Headers = ()
        if work.issues:
            own = self._transport.issue(work.session.id, work.max_age())
        elif work.clears:
            own = self._transport.clear()
        if not own and not work.accessed:
            return message
        headers = message.get("headers") or ()
        if message["type"] == "websocket.accept":
            return {**message, "headers": [*headers, *own]}
        return {**message, "headers": merged(headers, own, self._transport.vary)}

    def _take_replacement(self) -> None:
        """Take over data that the application has put in place of `scope["session"]`."""
        found = self._scope.get("session")
        if isinstance(found, SessionMapping) or "session" not in self._scope:
            return
        self._work.replace_data(found)
        self._scope["session"] = SessionMapping(self._work)

    def _start_keeping_alive(self) -> None:
        if not self._kept_alive and self._work.is_stored and self._group is not None:
            self._kept_alive = True
            self._group.start_soon(self._keep_alive)

    def _stop_keeping_alive(self) -> None:
        self._scope_of_looks.cancel()

    async def _keep_alive(self) -> None:
        with self._scope_of_looks:
            await self._look()

    async def _look(self) -> None:
        while True:
            await anyio.sleep(self._interval)
            try:
                self._ended = not await self._work.is_alive()
            except Exception as error:  # noqa: BLE001 - an outage is not a revocation
                _log.warning("the session of a stream was not renewed: %s", error)
            if self._ended:
                self._group.cancel_scope.cancel()
                return
