"""Every command that the storage sends, as a template in the wire form.

A template is packed once into a format with slots, because filling a few slots takes a third of the
time of packing a command. The wire form is RESP
(https://redis.io/docs/latest/develop/reference/protocol-spec/).
"""

import asyncio
import hashlib
from typing import Any, Final


class Template:
    """A command with slots for its key and its arguments.

    Args:
        words: The words of the command; each None is a slot, and the first slot is the key.
        replies: The types that a reply can have. An error reply is always possible.
        retryable: Whether the command may be sent twice.
        writes: Whether the command may change a session.
        bulky: Whether the reply holds a whole record.
    """

    def __init__(
        self,
        *words: bytes | None,
        replies: tuple[type, ...],
        retryable: bool = False,
        writes: bool = True,
        bulky: bool = False,
    ) -> None:
        self.format = _pack(*words)
        self.replies = frozenset(replies)
        self.retryable = retryable
        self.writes = writes
        self.bulky = bulky

    def fill(self, deadline: float, key: bytes = b"", *words: bytes) -> "Command":
        """Make a command from the words for the slots."""
        if not words:
            return Command(
                self, self.format % (len(key), key) if key else self.format, key, deadline
            )
        return Command(self, self.format % _slots(key, *words), key, deadline)


class Command:
    """One command and the future that its caller awaits.

    The result of the future is the reply, or an exception in place of the reply. The router raises
    such an exception, in the terms of this package.

    Attributes:
        template: See `Template`.
        payload: The bytes to write; empty if no caller waits for the reply.
        key: The key, which decides the server.
        deadline: The time at which the command fails, on the event loop's clock.
        future: The future of the current attempt.
        extra_replies: How many replies precede the reply of the command itself: 1 if ASKING is
            written before it.
        replies_due: How many of these are still to come.
        stall_at: The time from which a missing reply means that the connection stalls.
        words: The words in the slots of a script.
        queued: Whether the command waits to be written.
        orphan: Whether the command is a write in flight whose caller is gone.
        attempts: How often the command was written to this server, and not refused.
        in_doubt: Whether the command may have been applied without a reply.
        weight: The bytes that the command counts for while it is in flight; 0 otherwise.
    """

    future: asyncio.Future[Any]
    extra_replies: int = 0
    replies_due: int = 0
    stall_at: float = 0.0
    words: tuple[bytes, ...] = ()
    queued: bool = False
    orphan: bool = False
    attempts: int = 0
    in_doubt: bool = False
    weight: int = 0

    def __init__(self, template: Template, payload: bytes, key: bytes, deadline: float) -> None:
        self.template = template
        self.payload = payload
        self.key = key
        self.deadline = deadline

    def resolve(self, result: Any) -> None:
        """Give the caller a reply, or an exception in its place, if the caller still waits."""
        if not self.future.done():
            self.future.set_result(result)

    def again(self) -> "Command":
        """The same command for another attempt, on this or another connection."""
        command = Command(self.template, self.payload, self.key, self.deadline)
        command.words = self.words
        command.in_doubt = self.in_doubt
        return command

    def ask(self) -> None:
        """Precede the command with ASKING, for a slot that is being imported."""
        self.extra_replies = 1


class Script(Template):
    """A Lua script that runs atomically on the server.

    Args:
        source: The source of the script.
        arguments: The number of its arguments.
        keys: The number of its keys; more than one need one server.
        replies: As for `Template`.
        retryable: As for `Template`.
        writes: As for `Template`.
    """

    def __init__(
        self,
        source: str,
        arguments: int,
        *,
        keys: int = 1,
        replies: tuple[type, ...] = (int,),
        retryable: bool = False,
        writes: bool = True,
    ) -> None:
        text = source.encode()
        # The server's script cache identifies a script by this digest; its strength is irrelevant.
        digest = hashlib.sha1(text, usedforsecurity=False).hexdigest().encode()
        slots = [None] * (keys + arguments)
        super().__init__(
            *(b"EVALSHA", digest, b"%d" % keys, *slots),
            replies=replies,
            retryable=retryable,
            writes=writes,
        )
        self._with_source = _pack(b"EVAL", text, b"%d" % keys, *slots)

    def fill(self, deadline: float, key: bytes = b"", *words: bytes) -> Command:
        """See `Template.fill`."""
        command = super().fill(deadline, key, *words)
        command.words = (key, *words)
        return command

    def send_source(self, command: Command) -> None:
        """Name the script by its source, for a server that does not know the digest."""
        command.payload = self._with_source % _slots(*command.words)


def getex(ttl: int) -> Template:
    """The load: read a record and renew its TTL of so many milliseconds."""
    return Template(
        *(b"GETEX", None, b"PX", b"%d" % ttl),
        replies=(bytes, type(None)),
        retryable=True,
        writes=False,
        bulky=True,
    )


def _pack(*words: bytes | None) -> bytes:
    """A command in the wire form, as a format with two slots (length, bytes) for each None."""
    packed = b"*%d\r\n" % len(words)
    for word in words:
        if word is None:
            packed += b"$%d\r\n%b\r\n"
        else:
            packed += (b"$%d\r\n%b\r\n" % (len(word), word)).replace(b"%", b"%%")
    return packed


def _slots(*words: bytes) -> tuple[int | bytes, ...]:
    """The parts for the slots of a format: each word and, before it, its length."""
    return tuple(part for word in words for part in (len(word), word))


def subscribe(channel: bytes) -> bytes:
    """Ask for the messages of a channel, in the wire form."""
    return _pack(b"SUBSCRIBE", channel)


ASKING: Final = _pack(b"ASKING")
PING: Final = _pack(b"PING")
_STRING: Final = (bytes,)

REVISION: Final = Template(
    *(b"GETRANGE", None, b"1", b"16"), replies=_STRING, retryable=True, writes=False
)
# A plain read, for records that must not be renewed.
PEEK: Final = Template(
    b"GETEX", None, replies=(bytes, type(None)), retryable=True, writes=False, bulky=True
)
PEXPIRE: Final = Template(b"PEXPIRE", None, None, replies=(int,), retryable=True, writes=False)
INFO: Final = Template(b"INFO", replies=_STRING, retryable=True, writes=False)
CLUSTER_SLOTS: Final = Template(b"CLUSTER", b"SLOTS", replies=(list,), retryable=True, writes=False)
