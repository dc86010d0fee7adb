"""Sessions of about 800 bytes, as a gateway would keep them."""

from collections.abc import Sequence
from datetime import UTC, datetime
from functools import cache
from typing import Any, Final

from aiosessions import JsonCodec, Session, new_session_id, session_digest
from aiosessions.record import seal, unseal

TTL: Final = 3600.0
TTL_MS: Final = 3_600_000
SESSIONS: Final = 1000
"""More than the callers, which do not share sessions, and quick to store."""

PREFIX: Final = "aiosessions-bench:"
"""Apart from other keys on a user's own server."""

CODEC: Final[JsonCodec[Any]] = JsonCodec()

_TOOLS = [
    {"name": f"tool-{number}", "server": f"backend-{number % 3}", "allowed": number % 4 != 0}
    for number in range(2000)  # enough for 100 KB
]


def session(size: int = 800, id: str | None = None) -> Session[Any]:
    """Make a session with a record of about `size` bytes (at least 200)."""
    data: dict[str, Any] = {"counter": 0}
    made = Session[Any](
        id=id or new_session_id(),
        kind="mcp",
        data=data,
        created_at=datetime(2026, 1, 1, 12, tzinfo=UTC),
        updated_at=datetime(2026, 1, 1, 12, tzinfo=UTC),
    )
    if size >= 400:
        made.principal = "user-12345"
        made.metadata = {"protocol": "2025-11-25", "client": "inspector/0.17"}
        data["tools"] = []
    while (missing := size - len(sealed(made))) > 70 and size >= 400:
        step = max(1, missing // 70)
        data["tools"] += _TOOLS[len(data["tools"]) :][:step]
    data["note"] = "x" * max(0, size - len(sealed(made)) - 10)
    return made


def sessions(ids: Sequence[str] | None = None) -> list[Session[Any]]:
    """Several sessions that differ in their ids, which are new if none are given."""
    return [session(id=id) for id in ids or [new_session_id() for _ in range(SESSIONS)]]


@cache
def key(id: str) -> str:
    """The key of a session in `RedisStorage`, kept because a bare driver computes no digest."""
    return PREFIX + session_digest(id)


def sealed(made: Session[Any]) -> bytes:
    """Make the record of a session, as every storage keeps it."""
    return seal(made, CODEC)[2]


def opened(record: Any, id: str) -> Session[Any]:
    """Decode a record and check its id, as every storage does.

    Raises:
        LookupError: The record is missing.
    """
    if record is None:
        raise LookupError("a session of the benchmark is gone")
    return unseal(record, id, CODEC, lambda: 0)


def callers_text(callers: int) -> str:
    """Callers in words."""
    return "1 caller" if callers == 1 else f"{callers} callers"
