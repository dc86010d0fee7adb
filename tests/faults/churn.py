"""The size of the index after a day of sign-ins: entries over live sessions.

`python -m tests.faults.churn` simulates a day of 1,000 principals and 100,000 sessions on a real
server, or in a cluster with `--cluster`.

A session begins at a random minute of the day. Its user loads it every few minutes, and then signs
out, or leaves it to expire. The clock of the storage is a fake one, and every simulated minute
shortens the TTL of all keys by a minute, those of the indexes included. So the day is whole, and
only its hours of waiting are left out.
"""

import argparse
import asyncio
import random
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Final

from aiosessions import Session, SessionNotFound
from aiosessions.testing import FakeClock
from tests.support.clients import Storage
from tests.support.servers import Server, binaries, running
from tests.support.steps import replicas_of
from tests.support.topologies import QUIET, Cluster, cluster

MINUTES: Final = 24 * 60
TTL: Final = 30 * 60.0
_BATCH: Final = 500


@dataclass(frozen=True)
class Habits:
    """The users.

    Attributes:
        principals: The number of users.
        sessions: The sessions that begin in the time.
        minutes: The length of the simulated time.
        stay: The mean minutes from the first to the last use of a session.
        pause: The mean minutes between two uses.
        sign_out: The share of sessions that end with a sign-out.
    """

    principals: int = 1_000
    sessions: int = 100_000
    minutes: int = MINUTES
    stay: float = 20.0
    pause: float = 5.0
    sign_out: float = 0.3


@dataclass(frozen=True)
class Size:
    """A reading of the server.

    Attributes:
        entries: The entries of all indexes.
        sessions: The live sessions.
    """

    entries: int
    sessions: int

    @property
    def ratio(self) -> float:
        """Entries per live session."""
        return self.entries / max(1, self.sessions)


class Day:
    """The events of a simulated time: creations, loads and deletions, by minute.

    Args:
        habits: The users.
        seed: The seed of all random choices.
    """

    def __init__(self, habits: Habits, seed: int) -> None:
        rng = random.Random(seed)  # noqa: S311 - replayed
        self.events: dict[int, list[tuple[str, int]]] = defaultdict(list)
        self.owners: list[str] = []
        for number in range(habits.sessions):
            self.owners.append(str(rng.randrange(habits.principals)))
            minute = rng.uniform(0, habits.minutes)
            last = minute + rng.expovariate(1 / habits.stay)
            self.events[int(minute)].append(("create", number))
            while (minute := minute + rng.expovariate(1 / habits.pause)) < last:
                self.events[int(minute)].append(("load", number))
            if rng.random() < habits.sign_out:
                self.events[int(last)].append(("delete", number))


async def simulate(
    backend: Server | Cluster, habits: Habits, *, seed: int = 0, every: int = 60
) -> list[Size]:
    """Let the time pass, and measure every so many minutes.

    Raises:
        AssertionError: A list of a principal differs from the live sessions at the end.
    """
    day, clock, sizes = Day(habits, seed), FakeClock(), list[Size]()
    async with replicas_of(backend, 1, ttl=TTL, timeout=30.0, clock=clock) as (storage,):
        for minute in range(habits.minutes):
            events = day.events[minute]
            for kind in ("create", "load", "delete"):
                numbers = [number for each, number in events if each == kind]
                for start in range(0, len(numbers), _BATCH):
                    batch = numbers[start : start + _BATCH]
                    await asyncio.gather(
                        *(_act(storage, kind, str(number), day.owners[number]) for number in batch)
                    )
            clock.advance(60)
            backend.age(60)
            if (minute + 1) % every == 0 or minute + 1 == habits.minutes:
                sizes.append(measure(backend))
        lists = [await storage.list(str(number)) for number in range(habits.principals)]
        assert sum(map(len, lists)) == sizes[-1].sessions
    return sizes


async def _act(storage: Storage, kind: str, id: str, owner: str) -> None:
    if kind == "create":
        await storage.store(Session[Any](id=id, principal=owner))
    elif kind == "delete":
        await storage.delete(id)
    else:
        with suppress(SessionNotFound):  # the user was away for a TTL
            await storage.load(id)


def measure(backend: Server | Cluster) -> Size:
    """Count the entries and the sessions, without any effect on them."""
    entries = sessions = 0
    for server in [backend] if isinstance(backend, Server) else backend.masters():
        with server.client() as client:
            for key in client.scan_iter("session:*", count=10_000):
                if key.startswith(b"session:principal:"):
                    entries += int(client.zcard(key))
                else:
                    sessions += 1
    return Size(entries, sessions)


@contextmanager
def _backend(*, in_cluster: bool) -> Iterator[Server | Cluster]:
    binary = binaries()["valkey"]
    if in_cluster:
        with cluster(binary, node_timeout=QUIET) as nodes:
            yield nodes
    else:
        with running(binary) as server:
            yield server


def main(arguments: Sequence[str]) -> int:
    """Run the simulation, and print a line per hour."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--principals", type=int, default=Habits.principals)
    parser.add_argument("--sessions", type=int, default=Habits.sessions)
    parser.add_argument("--minutes", type=int, default=Habits.minutes)
    parser.add_argument("--sign-out", type=float, default=Habits.sign_out)
    parser.add_argument("--stay", type=float, default=Habits.stay)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cluster", action="store_true")
    given = parser.parse_args(arguments)
    habits = Habits(
        principals=given.principals,
        sessions=given.sessions,
        minutes=given.minutes,
        stay=given.stay,
        sign_out=given.sign_out,
    )
    with _backend(in_cluster=given.cluster) as backend:
        sizes = asyncio.run(simulate(backend, habits, seed=given.seed))
    for size in sizes:
        print(f"{size.entries} entries, {size.sessions} sessions: {size.ratio:.2f}")  # noqa: T201
    print(f"most: {max(size.ratio for size in sizes):.2f}; at the end: {sizes[-1].ratio:.2f}")  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
