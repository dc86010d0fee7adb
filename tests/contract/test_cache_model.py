"""Random schedules of replicas with near caches break no rule, and seeded bugs are found."""

import asyncio
from typing import Any, Final

import pytest

from aiosessions import NearCache
from aiosessions._copies import Copies, Pending
from aiosessions._loads import Loads
from tests.contract.cache_replicas import World


def find(seeds: range) -> tuple[int, str] | None:
    """Run the schedules of seeds; return the first that breaks a rule, and the rule."""
    with asyncio.Runner() as runner:
        for seed in seeds:
            world = World(seed)
            runner.run(world.run())
            if world.problems:
                return seed, world.problems[0]
    return None


def note_nothing(self: Copies, digest: str, revision: str) -> None:
    """Drop copies, but let loads and writes that have begun leave theirs."""
    copy = self._copies.get(digest)
    if copy is None or copy.revision != revision:
        self._copies.remove(digest)


def keep_as_new(self: Copies, copy: Any, pending: Pending) -> None:
    """Count the age from the end of a load."""
    pending.began = self.now()
    _keep(self, copy, pending)


def join_any(self: Loads[Any], load: Any) -> Any:
    """Join each load that is young enough."""
    return self._copies.now() - load.pending.began < self._longest


def decode_once(self: NearCache[Any], found: Any, id: str) -> Any:
    """Give each caller the same object."""
    decoded = vars(self).setdefault("decoded", {})
    if found.payload not in decoded:
        decoded[found.payload] = _decoded(self, found, id)
    return decoded[found.payload]


_keep = Copies.keep
_decoded = NearCache._decoded
NOTHING: Final = lambda *_, **__: None  # noqa: E731

# By name: the rules that each bug breaks, the class, its attribute, and another value for it.
BUGS: Final[dict[str, tuple[type, str, Any]]] = {
    "load-before-a-change-leaves-a-copy": (Copies, "_drop", note_nothing),
    "age-counts-from-the-end": (Copies, "keep", keep_as_new),
    "copies-survive-an-interruption": (Copies, "interrupted", NOTHING),
    "copies-survive-the-resumption": (Copies, "resumed", NOTHING),
    "announcement-is-ignored": (Copies, "changed", NOTHING),
    "copy-survives-a-failed-write": (Copies, "doubt", NOTHING),
    "copies-survive-a-sign-out": (Copies, "forget", lambda *_: []),
    "load-before-a-change-is-joined": (Loads, "_can_join", join_any),
    "pending-entry-is-left": (Copies, "end", NOTHING),
    "callers-share-the-session": (NearCache, "_decoded", decode_once),
}


def test_random_schedules_break_no_rule() -> None:
    """Every read is as young as its rules say, and nothing is left."""
    assert find(range(150)) is None


@pytest.mark.parametrize(("owner", "name", "bug"), BUGS.values(), ids=BUGS)
def test_bug_is_found(monkeypatch: pytest.MonkeyPatch, owner: type, name: str, bug: Any) -> None:
    """The schedules are able to fail."""
    monkeypatch.setattr(owner, name, bug)

    assert find(range(300)) is not None
