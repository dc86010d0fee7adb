"""Puts servers, a load and a fault together, and judges what came of it.

A scenario is a coroutine function that plays on a `Stage`: it starts servers, opens the stage's
load, breaks something and mends it, and says when. The rest is the same for all of them.
"""

import asyncio
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import msgspec
import redis

from aiosessions import new_session_id
from tests.servers import Server

from . import journal
from .checker import Verdict, check
from .journal import Event, Found
from .witness import Pulse, Witness
from .workload import Settings, Target, opened, prepare, shared_ids

_ROOT = Path(__file__).parents[2]
_PATIENCE = 60.0
_PREFIX = b"session:"
_HEADER = 32  # bytes in front of a record's payload; see docs/stored-form.md


class Form(msgspec.Struct, frozen=True):
    """How long and how hard.

    Attributes:
        workers: Processes of the load.
        callers: Callers in each.
        rounds: How often a fault happens.
        span: Seconds that a fault lasts, and that go by before it and after it.
    """

    workers: int = 3
    callers: int = 6
    rounds: int = 3
    span: float = 1.0


SHORT = Form(workers=2, callers=4, rounds=1, span=0.4)
"""For the ordinary tests."""


@dataclass(frozen=True)
class Scenario:
    """A fault, and what is expected of it.

    Attributes:
        name: What the command line calls it.
        title: What the page calls it.
        play: What happens.
        causes: The beginnings of what callers may be told; nothing else is right.
        certain: What some of them must have been told.
        recovers_within: Seconds, after it was mended.
        loses: Whether the servers may lose acknowledged writes, as they were set up.
        refuses: Whether the server refuses writes, so that none that failed has been applied.
    """

    name: str
    title: str
    play: "Callable[[Stage], Awaitable[None]]"
    causes: tuple[str, ...] = ()
    certain: str = ""
    recovers_within: float = 1.0
    loses: bool = False
    refuses: bool = False


class Result(msgspec.Struct):
    """What came of a scenario, once.

    Attributes:
        name: The scenario's.
        title: As well.
        seconds: How long the load was on.
        operations: Verbs that ended.
        acknowledged: Of these, writes and deletions that were acknowledged.
        errors: `StorageUnavailable` by its message; there are no other errors.
        wrong: Replies that contradict a promise.
        lost: Acknowledged writes and deletions that were lost.
        may_lose: Whether the servers were set up so that they may be.
        unknown: Writes and deletions whose callers were told an error ...
        applied: ... and writes among them that had been applied all the same.
        recovery: Seconds, each time, from when it was mended to when all callers were served again
            and nobody was told an error any more.
        timeout: What every verb has to end within, in seconds.
        latest: By how many seconds the latest verb missed that.
        notes: Figures of this scenario alone.
        problems: What was not as it should be; empty if it passed.
    """

    name: str
    title: str
    seconds: float
    operations: int
    acknowledged: int
    errors: dict[str, int]
    wrong: int
    lost: int
    may_lose: bool
    unknown: int
    applied: int
    recovery: list[float]
    timeout: float
    latest: float
    notes: dict[str, str]
    problems: list[str]


class WorkerError(Exception):
    """A worker has failed, which is the suite's fault. The message is what it complained of."""


class Stage:
    """Where one scenario is played.

    Attributes:
        form: How long and how hard.
        replicated: What had been replicated when the master was gone: that must not be lost.
        notes: Figures to put into the result.
        shared: The ids of the sessions that all callers change, once the load is on.
        problems: What the scenario itself found not to be as it should.
    """

    def __init__(self, form: Form) -> None:
        self.form = form
        self.replicated: dict[str, Found] = {}
        self.notes: dict[str, str] = {}
        self.shared: list[str] = []
        self.problems: list[str] = []
        self._timeout = 0.0
        self._broken: list[float] = []
        self._mended: list[float] = []
        self._without: list[tuple[float, float, str]] = []
        self._began = self._ended = 0.0
        self._events: list[Event] = []
        self._final: dict[str, Found] = {}

    async def wait(self, spans: float = 1.0) -> None:
        """Let time go by."""
        await asyncio.sleep(self.form.span * spans)

    def broken(self) -> None:
        """From now on something is broken."""
        self._broken.append(time.monotonic())

    def mended(self, at: float | None = None) -> None:
        """From now on it should be as before."""
        self._mended.append(time.monotonic() if at is None else at)

    @contextmanager
    def without(self, cause: str) -> Iterator[None]:
        """While the block runs, nobody may be told this, which begins a message."""
        begin = time.monotonic()
        yield
        self._without.append((begin, time.monotonic(), cause))

    @asynccontextmanager
    async def load(
        self,
        target: Target,
        servers: Callable[[], Sequence[Server]],
        *,
        timeout: float,
        secrets: Sequence[str] = (),
        steps: Sequence[tuple[float, float]] = (),
    ) -> AsyncIterator[None]:
        """The load is on while the block runs; a span of calm begins and ends it.

        Args:
            target: Where the storage is.
            servers: Where sessions are stored in the end.
            timeout: The storage's, in seconds.
            secrets: What no error may say.
            steps: When and by how many seconds the first worker's clock is stepped.
        """
        self._timeout = timeout
        seed = new_session_id()
        self.shared = shared_ids(seed)
        await self._prepare(target, seed)
        with tempfile.TemporaryDirectory(prefix="aiosessions-") as name, ExitStack() as stack:
            directory = Path(name)
            workers: list[subprocess.Popen[str]] = []
            epoch = time.monotonic()
            for number in range(self.form.workers):
                settings = Settings(
                    target=target,
                    seed=seed,
                    worker=number,
                    workers=self.form.workers,
                    epoch=epoch,
                    callers=self.form.callers,
                    timeout=timeout,
                    journal=str(_journal(directory, number)),
                    secrets=[*secrets],
                    steps=[*steps] if number == 0 else [],
                )
                errors = stack.enter_context(_errors(directory, number).open("wb"))
                workers.append(stack.enter_context(started(settings, errors)))
                stack.callback(workers[-1].kill)
            await asyncio.to_thread(begin, workers)
            self._began = time.monotonic()
            await self.wait()
            yield
            await self.wait()
            self._ended = time.monotonic()
            failed = await asyncio.to_thread(end, workers)
            if failed:
                raise WorkerError(_errors(directory, failed[0]).read_text("utf-8")[-4_000:])
            for worker in range(self.form.workers):
                self._events += journal.read(_journal(directory, worker))
        self._final = await asyncio.to_thread(stored, servers())

    async def _prepare(self, target: Target, seed: str) -> None:
        pulse = Pulse()
        async with opened(target, timeout=_PATIENCE, ttl=600.0) as storage:
            witness = Witness(
                storage, self._events.append, number=-1, timeout=_PATIENCE, pulse=pulse
            )
            await prepare(witness, seed)

    def result(self, scenario: Scenario) -> Result:
        """Judge it."""
        verdict = check(
            self._events,
            self._final,
            loses=(self._broken[0], self._mended[0]) if scenario.loses else None,
            replicated=self.replicated,
        )
        return Result(
            name=scenario.name,
            title=scenario.title,
            seconds=round(self._ended - self._began, 1),
            operations=verdict.verbs,
            acknowledged=verdict.acknowledged,
            errors=dict(sorted(verdict.errors.items())),
            wrong=len(verdict.wrong),
            lost=len(verdict.lost),
            may_lose=scenario.loses,
            unknown=verdict.unknown,
            applied=verdict.applied,
            recovery=[round(seconds, 3) for seconds in self._recovery()],
            timeout=self._timeout,
            latest=round(verdict.latest, 3),
            notes=self.notes,
            problems=self._problems(scenario, verdict),
        )

    def _windows(self) -> list[tuple[float, float]]:
        """When all was in order again, each time, and until when."""
        windows: list[tuple[float, float]] = []
        for begin in self._mended:
            later = (moment for moment in self._broken if moment > begin)
            windows.append((begin, min(later, default=self._ended)))
        return windows

    def _recovery(self) -> list[float]:
        return [self._recovered(*window) - window[0] for window in self._windows()]

    def _recovered(self, begin: float, end: float) -> float:
        first: dict[int, float] = {}
        last = begin
        for event in self._events:
            if begin < event.end < end:
                if event.unknown:
                    last = max(last, event.end)
                else:
                    first[event.caller] = min(first.get(event.caller, end), event.end)
        everybody = {event.caller for event in self._events if event.caller >= 0}
        return max(last, *(first.get(caller, end) for caller in everybody))

    def _problems(self, scenario: Scenario, verdict: Verdict) -> list[str]:
        problems = [
            *self.problems,
            *(f"wrong, {n} times: {what}" for what, n in Counter(verdict.wrong).most_common(5)),
        ]
        if verdict.lost and not scenario.loses:
            problems.append(f"{len(verdict.lost)} acknowledged writes lost: {verdict.lost[:3]}")
        if scenario.refuses and verdict.applied:
            problems.append(f"{verdict.applied} writes were refused, and applied")
        problems += [
            f"told, {times} times: {message}"
            for message, times in verdict.errors.items()
            if not message.startswith(scenario.causes or "nothing")
        ]
        if not any(message.startswith(scenario.certain) for message in (*verdict.errors, "")):
            problems.append(f"nobody was told: {scenario.certain}")
        for begin, end, cause in self._without:
            during = [e for e in self._events if begin < e.end and e.start < end]
            told = sum(e.unknown and e.message.startswith(cause) for e in during)
            if told:
                problems.append(f"told, {told} times, without a reason: {cause}")
        for begin, end in self._windows():
            took = self._recovered(begin, end) - begin
            if took > scenario.recovers_within:
                problems.append(f"recovered after {took:.2f} s, not {scenario.recovers_within} s")
        return problems


async def play(scenario: Scenario, form: Form) -> Result:
    """Play a scenario once."""
    stage = Stage(form)
    await scenario.play(stage)
    return stage.result(scenario)


def _journal(directory: Path, worker: int) -> Path:
    return directory / f"{worker}.journal"


def _errors(directory: Path, worker: int) -> Path:
    return directory / f"{worker}.errors"


def started(settings: Settings, errors: IO[bytes] | None = None) -> subprocess.Popen[str]:
    """A worker, which is connecting. What it complains of goes to `errors`, or where ours goes."""
    return subprocess.Popen(  # noqa: S603 - ours
        [sys.executable, "-m", "tests.faults.worker", msgspec.json.encode(settings).decode()],
        cwd=_ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
    )


def begin(workers: Sequence[subprocess.Popen[str]]) -> None:
    """Wait until all are ready, and let them begin."""
    for worker in workers:
        assert worker.stdout is not None
        line = worker.stdout.readline()
        assert line == "ready\n", "a worker has died"
    for worker in workers:
        _tell(worker)


def end(workers: Sequence[subprocess.Popen[str]]) -> list[int]:
    """Let them end, and wait until they have.

    Returns:
        The numbers of those that have failed.
    """
    for worker in workers:
        with suppress(BrokenPipeError):  # it has ended, and its status will tell
            _tell(worker)
    return [number for number, worker in enumerate(workers) if worker.wait(_PATIENCE) != 0]


def _tell(worker: subprocess.Popen[str]) -> None:
    assert worker.stdin is not None
    worker.stdin.write("\n")
    worker.stdin.flush()


def stored(servers: Sequence[Server]) -> dict[str, Found]:
    """What is stored, read without the library's help."""
    found: dict[str, Found] = {}
    for server in servers:
        with redis.Redis.from_url(server.url, single_connection_client=True) as client:
            with suppress(redis.ResponseError):  # it is in no cluster
                client.execute_command("READONLY")  # as it may be a replica
            keys: list[bytes] = list(client.scan_iter(match=_PREFIX + b"*", count=1_000))
            for key in keys:
                record: Any = client.get(key)
                data = json.loads(record[_HEADER:])["data"]
                found[key.removeprefix(_PREFIX).decode()] = Found(data["token"], data["count"])
    return found
