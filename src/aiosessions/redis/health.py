"""The health of servers, and the statistics of connections."""

from typing import Any, Final

import msgspec

# GETEX came with 6.2. Valkey, a fork of 7.2, still reports a version of Redis.
_OLDEST: Final = (6, 2)


class ServerHealth(msgspec.Struct, frozen=True, kw_only=True):
    """The health of one server, as `RedisStorage.ping` found it.

    Attributes:
        address: Host and port, or the path of the socket.
        available: Whether the server has answered. If not, only `round_trip` and `warnings` hold
            information.
        round_trip: Seconds from the question to the answer, the wait in the queue included.
        name: "redis", "valkey", or another name that the server gives itself.
        version: Its version.
        role: "master" or "slave".
        eviction_policy: Its `maxmemory-policy`.
        warnings: The dangers to sessions, in words; empty if there are none.
    """

    address: str
    available: bool
    round_trip: float
    name: str = ""
    version: str = ""
    role: str = ""
    eviction_policy: str = ""
    warnings: tuple[str, ...] = ()


class RedisStatistics(msgspec.Struct, frozen=True, kw_only=True):
    """The state of a `RedisStorage`, over all of its connections.

    Attributes:
        connected: Connections that are up.
        queued: Commands that wait to be written.
        in_flight: Commands that were written and wait for their replies.
        reconnects: Connections that were made in place of lost ones.
        bytes_sent: Bytes of commands.
        bytes_received: Bytes of replies.
    """

    connected: int
    queued: int
    in_flight: int
    reconnects: int
    bytes_sent: int
    bytes_received: int


def health(address: str, answer: Any, round_trip: float) -> ServerHealth:
    """Read the reply to INFO (https://redis.io/docs/latest/commands/info/), or an error.

    A field that a server leaves out is empty and causes no warning.
    """
    if isinstance(answer, Exception):
        return ServerHealth(
            address=address, available=False, round_trip=round_trip, warnings=(str(answer),)
        )
    lines = (line.partition(":") for line in answer.decode("utf-8", "replace").splitlines())
    fields = {name: value.strip() for name, _, value in lines}
    name = fields.get("server_name", "redis")
    compatible = fields.get("redis_version", "")
    role = fields.get("role", "")
    policy = fields.get("maxmemory_policy", "")
    warnings: list[str] = []
    numbers = _numbers(compatible)
    if numbers and numbers < _OLDEST:
        warnings.append(f"version {compatible} has no GETEX: Redis 6.2 or later is needed")
    if role == "slave":
        warnings.append("this is a replica, which accepts neither writes nor loads")
    if policy not in ("", "noeviction") and fields.get("maxmemory", "0") != "0":
        warnings.append(
            f"maxmemory-policy is {policy}: short of memory, the server drops sessions; "
            "noeviction refuses new ones instead"
        )
    return ServerHealth(
        address=address,
        available=True,
        round_trip=round_trip,
        name=name,
        version=fields.get(f"{name}_version", compatible),
        role=role,
        eviction_policy=policy,
        warnings=tuple(warnings),
    )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part[:9]) for part in version.split(".")[:2] if part.isdecimal())
