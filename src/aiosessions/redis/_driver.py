"""The only module that touches the connections of redis-py.

redis-py makes the connection: TLS, credentials, the database, Sentinel, the protocol version. Then
this module takes the transport out of it and gives it to a protocol of our own. From that moment
redis-py neither reads nor writes.

A borrowed client is only read: its pool is neither used nor changed. Each connection gets the
settings of the client, except that

- it does not retry, because the pipeline decides about that;
- it sets no timeouts: commands have deadlines, and connecting has a separate one;
- maintenance notifications are off, because they would change timeouts in use.
"""

import asyncio
import contextlib
import string
from collections.abc import Callable
from typing import Any, Final, Protocol
from urllib.parse import urlsplit

from redis.asyncio import Redis, RedisCluster
from redis.asyncio.connection import AbstractConnection, SSLConnection, UnixDomainSocketConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError, ResponseError
from redis.maint_notifications import MaintNotificationsConfig

from ._errors import ConnectError, as_reply, connect_error

Address = tuple[str, int]
ConnectionFactory = Callable[[], AbstractConnection]

_SCHEMES: Final = {
    "redis": "redis",
    "rediss": "rediss",
    "valkey": "redis",
    "valkeys": "rediss",
    "unix": "unix",
}
_USAGE: Final = (
    "use redis://[user:password@]host[:port][/database] or valkey://..., rediss:// or valkeys:// "
    "for TLS, or unix://[user:password@]/path, then ?option=value&... as for redis-py"
)


class Transport(Protocol):
    """The part of `asyncio.WriteTransport` that the connection uses."""

    def write(self, data: bytes) -> None:
        """Send bytes, now or later."""
        ...

    def abort(self) -> None:
        """Close at once, without sending the rest."""
        ...


class Receiver(asyncio.Protocol):
    """A protocol that also takes parsed replies.

    Attributes:
        streams: The streams of the driver. They complain if they are dropped before the transport
            is closed.
    """

    streams: object = None

    def reply_received(self, reply: Any) -> None:
        """Take a reply from a connection that parses by itself."""
        raise NotImplementedError


def client_from_url(url: str) -> Redis:
    """Make a client from a URL. Servers list its connections under the name "aiosessions".

    Raises:
        ValueError: The URL is wrong. The message names the part, and never quotes it, because it
            may be a password.
    """
    if not isinstance(url, str):
        message = f"url is a str, not {type(url).__name__}"
        raise TypeError(message)
    normalised = _normalise_url(url)
    try:
        client = Redis.from_url(normalised, client_name="aiosessions")
        connection_factory(client)()  # refuses unknown options
    except (ValueError, TypeError, RedisError):
        pass
    else:
        return client
    message = f"an option of the URL is not one of redis-py's, or has a wrong value; {_USAGE}"
    raise ValueError(message)


def _normalise_url(url: str) -> str:
    """The URL with a scheme that redis-py knows.

    Raises:
        ValueError: A part of the URL is wrong, or redis-py would ignore it.
    """
    scheme, separator, rest = url.partition("://")
    known = _SCHEMES.get(scheme.lower())
    problem = ""
    if not separator or known is None:
        problem = "the URL has no scheme that is known"
    elif not url.isprintable() or set(url) & set(string.whitespace):
        problem = "the URL holds a space or a control character; quote it, as in %20"
    elif "#" in url:
        problem = "the URL holds a #; in a password, quote it as %23"
    else:
        problem = _problem_with(known, url)
    if problem:
        message = f"{problem}; {_USAGE}"
        raise ValueError(message)
    return f"{known}://{rest}"


def _problem_with(scheme: str, url: str) -> str:
    """The part of a URL that is wrong, in words; empty if all parts are in order."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return "the host of the URL is not valid; in a password, quote [ as %5B and ] as %5D"
    try:
        port = parts.port
    except ValueError:
        port = 0
    path = parts.path.removeprefix("/")
    if scheme == "unix":
        return "" if path else "the URL has no path of a socket"
    if "@" in parts.query:
        return "the URL has an @ after a ?; in a password, quote a ? as %3F"
    if port == 0:
        return (
            "the port of the URL is not a number from 1 to 65535; "
            "in a password, quote / as %2F and ? as %3F"
        )
    if path and not (path.isascii() and path.isdecimal()):
        return "the database of the URL is not a number"
    return ""


def connection_factory(client: Redis) -> ConnectionFactory:
    """Return a function that makes connections like those of the client's pool."""

    def make() -> AbstractConnection:
        pool = client.connection_pool
        return _make(pool.connection_class, pool.connection_kwargs)

    return make


def node_connection_factory(client: RedisCluster, host: str, port: int) -> ConnectionFactory:
    """Return a function that makes connections to one node of the client's cluster."""
    settings = {
        name: value
        for name, value in client.connection_kwargs.items()
        if name not in ("connection_class", "max_connections", "response_callbacks")
    }
    connection_class: type[AbstractConnection] = client.connection_kwargs["connection_class"]
    return lambda: _make(connection_class, {**settings, "host": host, "port": port})


def _make(
    connection_class: type[AbstractConnection], settings: dict[str, Any]
) -> AbstractConnection:
    ours: dict[str, Any] = {
        "retry": Retry(NoBackoff(), 0),
        "retry_on_error": [],
        "retry_on_timeout": False,
        "health_check_interval": 0,
        "socket_timeout": None,
        "socket_connect_timeout": None,
        "maint_notifications_config": MaintNotificationsConfig(enabled=False),
    }
    try:
        return connection_class(**(settings | ours))
    except Exception as error:  # noqa: BLE001 - classes of the application's own raise anything
        text = f"a connection cannot be made: {type(error).__name__}"
        raise ConnectError(text, transient=False) from None


def address_of(connection: AbstractConnection) -> str:
    """The address of a connection, for messages: host and port, or the path of a socket."""
    if isinstance(connection, UnixDomainSocketConnection):
        return str(connection.path)
    host, port = getattr(connection, "host", ""), getattr(connection, "port", "")
    if host:
        return host_and_port(host, port)
    pool = getattr(connection, "connection_pool", None)  # of Sentinel, which has not answered yet
    return f"Sentinel's {getattr(pool, 'service_name', 'server')}"


def host_and_port(host: str, port: int | str) -> str:
    """The address of a server, for messages."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


async def open_connection(
    connection: AbstractConnection, receiver: Receiver, timeout: float
) -> Transport:
    """Connect, take the transport over, and give it to the receiver.

    Raises:
        ConnectError: The attempt failed. Nothing of it remains.
    """
    problem: Exception
    try:
        async with asyncio.timeout(timeout):
            await connection.connect()  # type: ignore[no-untyped-call]
            transport = await _take_over(connection, receiver)
    except Exception as error:  # noqa: BLE001 - credential providers raise anything
        problem = error
    except BaseException as error:
        task = asyncio.current_task()
        if not isinstance(error, asyncio.CancelledError) or task is None or task.cancelling():
            _discard(connection)
            raise
        problem = RedisError()  # a credential provider awaited something that was cancelled
    else:
        return transport
    _discard(connection)
    tls = isinstance(connection, SSLConnection)
    # Outside of the handler, so that nothing is chained to the frames of the driver.
    raise connect_error(problem, address_of(connection), tls=tls)


async def _take_over(connection: AbstractConnection, receiver: Receiver) -> Transport:
    """Take the transport out of the connection, and give it to the receiver."""
    writer, reader = _private(connection, "_writer"), _private(connection, "_reader")
    if not isinstance(writer, asyncio.StreamWriter):
        return ReplyPump(connection, receiver)  # fakeredis does not have a transport
    if await connection.can_read():
        message = "the server sent more than the handshake asked for, or closed the connection"
        raise ConnectError(message, transient=True)
    transport = writer.transport
    _detach(connection)
    receiver.streams = reader, writer
    transport.set_protocol(receiver)
    return transport


def _private(connection: AbstractConnection, name: str) -> Any:
    try:
        return getattr(connection, name)
    except AttributeError:
        message = f"redis-py's connection has no {name}: this release of redis-py is not supported"
        raise ConnectError(message, transient=False) from None


def _discard(connection: AbstractConnection) -> None:
    """Drop a connection that failed, without waiting for anything."""
    writer = getattr(connection, "_writer", None)
    if isinstance(writer, asyncio.StreamWriter):
        writer.transport.abort()
    _detach(connection)


def _detach(connection: AbstractConnection) -> None:
    """Take its streams from a connection, which redis-py then considers closed."""
    for name in ("_reader", "_writer"):
        setattr(connection, name, None)


class ReplyPump:
    """A `Transport` over a connection that has none, such as fakeredis': a task reads replies."""

    def __init__(self, connection: AbstractConnection, receiver: Receiver) -> None:
        self._connection = connection
        self._receiver = receiver
        self._writes: asyncio.Queue[bytes] = asyncio.Queue()
        self._tasks = [
            asyncio.create_task(each, name="aiosessions: transport")
            for each in (self._write(), self._read())
        ]

    def write(self, data: bytes) -> None:
        """See `Transport.write`."""
        self._writes.put_nowait(data)

    def abort(self) -> None:
        """See `Transport.abort`."""
        for task in self._tasks:
            task.cancel()
        _discard(self._connection)

    async def _write(self) -> None:
        with contextlib.suppress(Exception):  # `_read` meets the same exception
            while True:
                data = await self._writes.get()
                await self._connection.send_packed_command([data], check_health=False)

    async def _read(self) -> None:
        reply: Any
        try:
            while True:
                try:
                    reply = await self._connection.read_response(disable_decoding=True)
                except ResponseError as error:
                    reply = as_reply(error)
                self._receiver.reply_received(reply)
        except Exception as error:  # noqa: BLE001 - drivers raise anything
            self._receiver.connection_lost(error)
