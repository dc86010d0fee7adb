"""One socket to a server: bytes in, replies out.

Invariant: a channel reports to its owner only while it is the channel in use. So a reply of a
socket that was replaced cannot reach a command of the next one.
"""

from typing import Any, Final, Protocol

import hiredis

from ._driver import Receiver, Transport
from ._errors import ErrorReply, ProtocolError, lost
from ._pipeline import Pipeline

# hiredis moves the rest of its buffer after each reply, which costs time for long buffers.
_SLICE: Final = 16 * 1024
_MORE: Final = object()


class Owner(Protocol):
    """The part of a connection that its channel needs; `Connection` describes it."""

    channel: "Channel | None"
    pipeline: Pipeline

    def received(self, size: int, replies: int) -> None:
        """Go on after a batch of replies."""
        ...

    def lose(self, channel: "Channel", error: Exception) -> None:
        """Replace a channel that has ended."""
        ...

    def pause(self, channel: "Channel", *, paused: bool) -> None:
        """Hold back the queue while the buffer of the transport is full."""
        ...


class Channel(Receiver):
    """One socket: parses replies and hands them to the pipeline of its owner.

    Args:
        owner: The connection that the socket belongs to.

    Attributes:
        transport: Writes to the socket; None until it is connected.
    """

    def __init__(self, owner: Owner) -> None:
        self._owner = owner
        self._reader = hiredis.Reader(
            protocolError=ProtocolError, replyError=ErrorReply, notEnoughData=_MORE
        )
        self.transport: Transport | None = None

    def data_received(self, data: bytes) -> None:
        """Resolve the futures of the answered commands."""
        owner = self._owner
        if owner.channel is not self:
            return
        feed, gets, answer = self._reader.feed, self._reader.gets, owner.pipeline.answer
        size, pending = len(data), len(owner.pipeline.in_flight)
        try:
            for start in range(0, size, _SLICE):
                feed(data, start, min(_SLICE, size - start))
                while (reply := gets()) is not _MORE:
                    answer(reply)
        except ProtocolError as error:
            owner.lose(self, ProtocolError(*error.args))
        else:
            owner.received(size, pending - len(owner.pipeline.in_flight))

    def reply_received(self, reply: Any) -> None:
        """See `Receiver.reply_received`."""
        if self._owner.channel is self:
            self._owner.pipeline.answer(reply)
            self._owner.received(0, 1)

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by the transport."""
        self._owner.lose(self, lost(exc))

    def pause_writing(self) -> None:
        """Called by the transport when its buffer is full."""
        self._owner.pause(self, paused=True)

    def resume_writing(self) -> None:
        """Called by the transport when its buffer has room again."""
        self._owner.pause(self, paused=False)

    def close(self) -> None:
        """Close the socket at once.

        Bytes that wait in the transport are dropped: their commands have failed, or are sent again.
        """
        if self.transport is not None:
            self.transport.abort()
