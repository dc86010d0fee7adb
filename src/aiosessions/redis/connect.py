"""How the shared connections are made: as the client would, without what would get in our way.

A borrowed client is only read: its pool is neither used nor changed. Each connection gets the
client's own settings (address, database, TLS, credentials, Sentinel, name), except that

- it never retries by itself: what may be sent again, and when, is the lane's to decide;
- it has no timeouts of its own: deadlines are the lane's, and one for connecting;
- maintenance notifications are off: with them redis-py 8.1 may reuse a connection that has an
  unread reply, and they would change timeouts under way.
"""

from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from redis.asyncio import Redis, RedisCluster
from redis.asyncio.connection import AbstractConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.maint_notifications import MaintNotificationsConfig

MakeConnection = Callable[[], AbstractConnection]

_SCHEMES = {
    "redis": "redis",
    "rediss": "rediss",
    "valkey": "redis",
    "valkeys": "rediss",
    "unix": "unix",
}


def client_from_url(url: str) -> Redis:
    """A client with the settings of a URL. Servers list its connections as "aiosessions".

    Raises:
        ValueError: The URL is not understood. What it holds may be a password: it is not quoted.
    """
    if not isinstance(url, str):
        message = f"the URL is a str, not {type(url).__name__}"
        raise TypeError(message)
    try:
        client = Redis.from_url(_for_the_driver(url), client_name="aiosessions")
        maker(client)()  # refuses options that no connection has
    except (ValueError, TypeError, RedisError):
        pass
    else:
        return client
    message = (
        "the URL is not understood; it is redis://[user:password@]host[:port][/database] or "
        "valkey://..., rediss:// or valkeys:// for TLS, or unix://[user:password@]/path, then "
        "?option=value&... as redis-py has them; what is special in a user name or a password is "
        "quoted (%2F for a slash)"
    )
    raise ValueError(message)


def _for_the_driver(url: str) -> str:
    """The URL with the scheme by which redis-py knows it.

    Raises:
        ValueError: Something of it would be lost on the driver, which ignores what it cannot use.
    """
    scheme, _, rest = url.partition("://")
    known = _SCHEMES.get(scheme.lower())
    parts = urlsplit(url)
    database = parts.path.removeprefix("/")
    has_place = bool(database) if known == "unix" else not database or database.isdecimal()
    if known is None or not has_place or parts.fragment or not url.isprintable() or " " in url:
        raise ValueError
    return f"{known}://{rest}"


def maker(client: Redis) -> MakeConnection:
    """What makes connections like those of a client's pool."""

    def make() -> AbstractConnection:
        pool = client.connection_pool
        return _make(pool.connection_class, pool.connection_kwargs)

    return make


def node_maker(client: RedisCluster, host: str, port: int) -> MakeConnection:
    """What makes connections to a node of the client's cluster."""
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
    """A connection, not connected yet, with the settings and without what is in our way."""
    ours: dict[str, Any] = {
        "retry": Retry(NoBackoff(), 0),
        "retry_on_error": [],
        "retry_on_timeout": False,
        "health_check_interval": 0,
        "socket_timeout": None,
        "socket_connect_timeout": None,
        "maint_notifications_config": MaintNotificationsConfig(enabled=False),
    }
    return connection_class(**(settings | ours))
