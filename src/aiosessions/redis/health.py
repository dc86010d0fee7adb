"""What a server says about itself that decides whether sessions are safe with it."""

from typing import Final

import msgspec

# GETEX came with it. Valkey, which forked from 7.2, goes on reporting a version of Redis.
_OLDEST: Final = (6, 2)


class ServerHealth(msgspec.Struct, frozen=True, kw_only=True):
    """One server, as `RedisStorage.ping` found it.

    Attributes:
        round_trip: Seconds from the question to the answer, waiting in line included.
        name: "redis", "valkey" or what else it calls itself.
        version: Its version.
        role: "master" or "slave".
        eviction_policy: Its `maxmemory-policy`.
        warnings: What endangers sessions, in words; empty if nothing does.
    """

    round_trip: float
    name: str
    version: str
    role: str
    eviction_policy: str
    warnings: tuple[str, ...]


def health_from_info(info: bytes, round_trip: float) -> ServerHealth:
    """Read the reply to INFO (https://redis.io/docs/latest/commands/info/).

    Fields that a server leaves out are empty, and give no warning.
    """
    lines = (line.partition(":") for line in info.decode("utf-8", "replace").splitlines())
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
        round_trip=round_trip,
        name=name,
        version=fields.get(f"{name}_version", compatible),
        role=role,
        eviction_policy=policy,
        warnings=tuple(warnings),
    )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part[:9]) for part in version.split(".")[:2] if part.isdecimal())
