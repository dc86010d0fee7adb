"""Runs a scenario: puts servers, a load and a nemesis together, and judges the history."""

import asyncio
import json
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import msgspec
import redis

from aiosessions import new_session_id, session_digest
from tests.support.loops import LOOPS
from tests.support.servers import Server

from .checker import check
from .client import Endpoint, LoopLag, RecordingStorage, open_storage
from .history import LATE, LIST, LOAD, REVOKE_ALL, UNCHANGED, Event, Found, cause
from .judge import Verdict
from .worker import workers
from .workload import LoadForm, prepare, shared_keys

_PATIENCE = 60.0
_BRIDGE = 0.9  # a little less than the second for which commands wait in an outage
_RECOVERS_WITHIN = {False: 1.0, True: 3.0}  # seconds, by `Scenario.promotes`
_PREFIX = b"session:"
_INDEX_PREFIX = _PREFIX + b"principal:"


SHORT = LoadForm(workers=len(LOOPS), clients=4, rounds=1, span=0.4)
"""The form for the ordinary tests."""


@dataclass(frozen=True)
class Scenario:
    """A fault, and the expected consequences."""

    title: str  # in the documentation
    happen: "Callable[[Run], Awaitable[None]]"  # runs the load, and breaks and mends servers
    causes: tuple[str, ...] = ()  # that errors may have, as beginnings of messages
    certain: str = ""  # a cause that some error must have
    in_doubt: bool = True  # errors may be in doubt; a server that refuses writes leaves no doubt
    bridged: bool = False  # commands wait for the server; see `unbridged`
    # A replica takes over. Recovery may take longer, and writes that were not replicated may be
    # lost.
    promotes: bool = False


class ScenarioResult(msgspec.Struct):
    """The result of one run of a scenario. See `Verdict` for the counts."""

    name: str
    title: str
    calls: int
    acknowledged: int
    errors: dict[str, int]
    doubts: dict[str, int]
    applied: int
    wrong: int
    lost: int
    recovery: list[float]  # for each fault, seconds until clients were served and errors stopped
    latest: float
    problems: list[str]  # broken expectations; empty if the scenario passed
    outlived: float = 0.0
    outlived_unannounced: float = 0.0


class Run:
    """One run of a scenario."""

    def __init__(self, form: LoadForm) -> None:
        self.form = form
        self.replicated: dict[str, Found] = {}  # when the master was gone
        self.keys: list[str] = []  # of the sessions and the indexes that all clients change
        self.problems: list[str] = []  # that the scenario itself found
        self._broken: list[float] = []
        self._mended: list[float] = []
        self._forbidden: list[tuple[float, float, str]] = []
        self._timeout = self._ended = 0.0
        self._events: list[Event] = []
        self._final: dict[str, Found] = {}
        self._contents = b""  # of the servers, at the end

    async def wait(self, spans: float = 1.0) -> None:
        """Wait for a number of spans."""
        await asyncio.sleep(self.form.span * spans)

    def broken(self) -> None:
        """Note that a fault begins now."""
        self._broken.append(time.monotonic())

    def mended(self) -> None:
        """Note that the fault ends now."""
        self._mended.append(time.monotonic())

    async def rounds(self) -> AsyncIterator[int]:
        """Number the rounds. The body is a fault, and a span of calm follows it."""
        for number in range(self.form.rounds):
            self.broken()
            yield number
            self.mended()
            await self.wait()

    @contextmanager
    def forbidding(self, cause: str) -> Iterator[None]:
        """Expect that no error has this cause while the block runs."""
        begin = time.monotonic()
        yield
        self._forbidden.append((begin, time.monotonic(), cause))

    @asynccontextmanager
    async def load(
        self,
        endpoint: Endpoint,
        servers: Callable[[], Sequence[Server]],
        *,
        timeout: float,
        **settings: Any,
    ) -> AsyncIterator[None]:
        """Run the load during the block, with a span of calm before and after it.

        `servers` returns the servers that hold the sessions at the end. `settings` are
        `WorkerSettings`.
        """
        self._timeout = timeout
        seed, record = new_session_id(), self._events.append
        self.keys = shared_keys(seed)
        async with open_storage(endpoint, timeout=_PATIENCE, ttl=600.0) as storage:
            await prepare(RecordingStorage(storage, record, -1, _PATIENCE, LoopLag()), seed)

        def receive(_: int, line: bytes) -> None:
            record(msgspec.json.decode(line, type=Event))

        async with workers(self.form, endpoint, receive, seed=seed, timeout=timeout, **settings):
            await self.wait()
            yield
            await self.wait()
            self._ended = time.monotonic()
        self._final = stored(servers())
        self._contents = b"\n".join(key + b" " + value for key, value in contents(servers()))

    def result(self, name: str, scenario: Scenario) -> ScenarioResult:
        """Judge the run."""
        exposed = exposed_ids({event.id for event in self._events}, self._contents)
        self.problems += [f"{len(exposed)} ids on the server"] if exposed else []
        for event in self._events:  # the server has digests only
            event.id = event.id and session_digest(event.id)
        verdict = check(
            self._events,
            self._final,
            loses=(self._broken[0], self._mended[0]) if scenario.promotes else None,
            replicated=self.replicated,
        )
        recovery = self._recovery()
        return ScenarioResult(
            name=name,
            title=scenario.title,
            recovery=[round(seconds, 3) for seconds in recovery],
            **vars(verdict) | {"wrong": len(verdict.wrong), "lost": len(verdict.lost)},
            problems=self._problems(scenario, verdict, recovery),
        )

    def _recovery(self) -> list[float]:
        """For each fault, the seconds until each client was served again and errors stopped."""
        clients = {event.client for event in self._events if event.client >= 0}
        recovery: list[float] = []
        for begin in self._mended:
            end = min((each for each in self._broken if each > begin), default=self._ended)
            first, last = dict.fromkeys(clients, end), begin
            for event in self._events:
                if begin < event.end < end and event.unavailable:
                    last = max(last, event.end)
                elif begin < event.end < end:
                    first[event.client] = min(first[event.client], event.end)
            recovery.append(max(last, *first.values()) - begin)
        return recovery

    def _problems(
        self, scenario: Scenario, verdict: Verdict, recovery: Sequence[float]
    ) -> list[str]:
        wrong = [f"wrong: {what}" for what in verdict.wrong]
        wrong += early(self._events, self._broken, self._timeout)
        if scenario.bridged:
            wrong += unbridged(self._events)
        wrong += [
            f"without a reason: {text}"
            for begin, end, text in self._forbidden
            for event in self._events
            if event.unavailable and event.message.startswith(text)
            if begin < event.end and event.start < end
        ]
        counted = Counter(wrong).most_common(10)
        problems = [*self.problems, *(f"{what}, {times} times" for what, times in counted)]
        if verdict.lost and not scenario.promotes:
            problems.append(f"{len(verdict.lost)} acknowledged writes lost: {verdict.lost[:3]}")
        if verdict.doubts and not scenario.in_doubt:
            problems.append(f"in doubt, though nothing was: {dict(verdict.doubts)}")
        causes = verdict.errors + verdict.doubts
        problems += [
            f"unexpected, {times} times: {text}"
            for text, times in causes.items()
            if not text.startswith((*scenario.causes, scenario.certain or "none"))
        ]
        if not any(text.startswith(scenario.certain) for text in (*causes, "")):
            problems.append(f"no error has the cause: {scenario.certain}")
        limit = _RECOVERS_WITHIN[scenario.promotes]
        problems += [f"recovered after {took:.2f} s" for took in recovery if took > limit]
        return problems


def unbridged(events: Sequence[Event]) -> Iterator[str]:
    """The errors that do not occur if commands wait for a server that soon returns.

    The storage sends reads and saves again. A save can be in doubt only if another client has
    written or revoked the session. Other writes fail only if they were in flight, and in doubt.
    """
    writers: defaultdict[str, set[int]] = defaultdict(set)
    for event in events:
        if event.verb != LOAD:
            writers[event.id].add(event.client)
    revoked = {event.principal for event in events if event.verb == REVOKE_ALL}
    shared = {event.id for event in events if event.principal in revoked}
    for event in events:
        alone = event.id not in shared and len(writers[event.id]) == 1
        retried = event.verb in (LOAD, LIST) or (event.verb == UNCHANGED and alone)
        if event.unavailable and (retried or not event.in_doubt):
            yield f"not bridged: {event.verb}: {cause(event.message)}"


def early(events: Iterable[Event], faults: Sequence[float], timeout: float) -> Iterator[str]:
    """The timeouts before the deadline of the call, in the first second of an outage.

    Only a write in doubt may fail early: its connection was replaced, so no reply can come. A load
    through a cache may have joined another one.

    Args:
        events: The calls of all clients.
        faults: The begin of each fault.
        timeout: The timeout of the storage, in seconds.
    """
    began: dict[tuple[int, int], float] = {}  # the first timeout by process and fault
    for event in sorted(events, key=lambda event: event.end):
        if not event.unavailable or cause(event.message) != LATE:
            continue
        fault = event.process, sum(event.end > begin for begin in faults)
        outage = event.end - began.setdefault(fault, event.end)
        retried = event.verb in (LOAD, UNCHANGED) or not event.in_doubt
        if retried and outage < _BRIDGE and event.end - event.since < timeout * 0.9:
            yield f"{event.verb}: failed before its deadline"


async def execute(name: str, scenario: Scenario, form: LoadForm) -> ScenarioResult:
    """Run a scenario once."""
    run = Run(form)
    await scenario.happen(run)
    return run.result(name, scenario)


def exposed_ids(ids: Iterable[str], contents: bytes) -> set[str]:
    """The ids that are in the contents of a server."""
    size = 16  # the beginning of an id is enough
    parts = {contents[at : at + size] for at in range(len(contents))}
    return {id for id in ids if id and id[:size].encode() in parts}


def stored(servers: Sequence[Server]) -> dict[str, Found]:
    """Read the stored sessions without the library."""
    values = dict(contents(servers))
    found: dict[str, Found] = {}
    for key, value in values.items():
        digest = key.removeprefix(_PREFIX)
        if b":" in digest:  # an index
            continue
        marked, owner = value[:1] == b"3", value[47:79]
        indexed = value[:1] == b"1" or digest in values.get(_INDEX_PREFIX + owner, b"")
        data = json.loads(value[value.index(b"{") :])["data"]
        found[digest.decode()] = Found(data["token"], data["count"], marked, indexed)
    return found


def contents(servers: Sequence[Server]) -> Iterator[tuple[bytes, bytes]]:
    """The keys of servers, each with its record, or with the digests of its index."""
    for server in servers:
        with redis.Redis.from_url(server.url, single_connection_client=True) as client:
            with suppress(redis.ResponseError):  # the server is not in a cluster
                client.execute_command("READONLY")  # for a replica, on the only connection
            for key in client.scan_iter(count=1_000):
                entries: Any = key.startswith(_INDEX_PREFIX) and client.zrange(key, 0, -1)
                value: Any = b" ".join(entries) if entries else client.get(key)
                if value is not None:  # else it has just expired
                    yield key, value
