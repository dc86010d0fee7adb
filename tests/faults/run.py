"""Runs a scenario: puts servers, a load and a fault together, and judges the history.

A scenario is a coroutine function that gets a `Run`. It starts servers, opens the load of the run,
breaks something, mends it, and tells the run when. Everything else is the same for all scenarios.
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
from tests.support.loops import LOOPS
from tests.support.servers import Server

from . import history
from .checker import Verdict, check, early, unbridged
from .history import Event, Found
from .recording import LoopLag, RecordingStorage
from .workload import Endpoint, WorkerSettings, open_storage, prepare, shared_ids

_ROOT = Path(__file__).parents[2]
_PATIENCE = 60.0
_PREFIX = b"session:"
_HEADER_BYTES = 32  # in front of a record's payload; see docs/stored-form.md


class LoadForm(msgspec.Struct, frozen=True):
    """The size of a load.

    Attributes:
        workers: The number of processes.
        clients: The number of clients in each process.
        rounds: How often a fault happens.
        span: How long a fault lasts, and the time before and after it, in seconds.
        loops: The event loops; the processes take them in turn.
    """

    workers: int = 3
    clients: int = 6
    rounds: int = 3
    span: float = 1.0
    loops: tuple[str, ...] = tuple(LOOPS)


SHORT = LoadForm(workers=len(LOOPS), clients=4, rounds=1, span=0.4)
"""The form for the ordinary tests."""


@dataclass(frozen=True)
class Scenario:
    """A fault, and the expected consequences.

    Attributes:
        name: The name on the command line.
        title: The name in the documentation.
        happen: The coroutine function.
        causes: The causes that errors may have, as beginnings of messages.
        certain: The cause that some error must have.
        recovers_within: The maximum time of recovery, in seconds.
        loses: Whether the servers may lose acknowledged writes, because of their settings.
        in_doubt: Whether errors may be in doubt. A server that refuses writes leaves no doubt.
        bridged: Whether commands wait for the server. Then a load never fails, and a write fails
            only if it was in flight and its outcome cannot be found out.
    """

    name: str
    title: str
    happen: "Callable[[Run], Awaitable[None]]"
    causes: tuple[str, ...] = ()
    certain: str = ""
    recovers_within: float = 1.0
    loses: bool = False
    in_doubt: bool = True
    bridged: bool = False


class ScenarioResult(msgspec.Struct):
    """The result of one run of a scenario.

    Attributes:
        name: The name of the scenario.
        title: The title of the scenario.
        seconds: The duration of the load.
        calls: The number of calls of verbs.
        acknowledged: The number of writes and deletes that succeeded.
        errors: The `StorageUnavailable` without doubt, by cause. Other errors do not occur.
        doubts: The `StorageUnavailable` in doubt, by cause.
        applied: The number of writes in doubt that turned out to be applied.
        wrong: The number of contradictions of a promise.
        lost: The number of acknowledged writes and deletes that were lost.
        may_lose: Whether the settings of the servers allow losses.
        recovery: For each fault, the seconds from its end until each client had been served again
            and errors had stopped.
        timeout: The timeout of the storage, in seconds.
        latest: The longest time from a deadline to the end of its call, in seconds.
        notes: Figures of this scenario alone.
        problems: The broken expectations; empty if the scenario passed.
    """

    name: str
    title: str
    seconds: float
    calls: int
    acknowledged: int
    errors: dict[str, int]
    doubts: dict[str, int]
    applied: int
    wrong: int
    lost: int
    may_lose: bool
    recovery: list[float]
    timeout: float
    latest: float
    notes: dict[str, str]
    problems: list[str]


class WorkerError(Exception):
    """A process of the load failed. The message is the end of its error output."""


class Run:
    """One run of a scenario.

    Attributes:
        form: The size of the load.
        replicated: The data that had been replicated when the master was gone.
        notes: Figures for the result.
        shared: The ids of the sessions that all clients change, once the load is open.
        problems: Broken expectations that the scenario itself found.
    """

    def __init__(self, form: LoadForm) -> None:
        self.form = form
        self.replicated: dict[str, Found] = {}
        self.notes: dict[str, str] = {}
        self.shared: list[str] = []
        self.problems: list[str] = []
        self._timeout = 0.0
        self._broken: list[float] = []
        self._mended: list[float] = []
        self._forbidden: list[tuple[float, float, str]] = []
        self._began = self._ended = 0.0
        self._events: list[Event] = []
        self._final: dict[str, Found] = {}

    async def wait(self, spans: float = 1.0) -> None:
        """Wait for a number of spans."""
        await asyncio.sleep(self.form.span * spans)

    def broken(self) -> None:
        """Note that a fault begins now."""
        self._broken.append(time.monotonic())

    def mended(self, at: float | None = None) -> None:
        """Note that the fault ends, now or at a given time."""
        self._mended.append(time.monotonic() if at is None else at)

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
        retry_after: tuple[float, float] = (0.005, 0.02),
        secrets: Sequence[str] = (),
        steps: Sequence[tuple[float, float]] = (),
    ) -> AsyncIterator[None]:
        """Run the load during the block, with a span of calm before and after it.

        Args:
            endpoint: The address of the storage.
            servers: Returns the servers that hold the sessions at the end.
            timeout: The timeout of the storage, in seconds.
            retry_after: The range of a client's pause after an error, in seconds.
            secrets: Texts that no error may contain.
            steps: Steps of the first process's clock: seconds after the start, and the new offset.
        """
        self._timeout = timeout
        seed = new_session_id()
        self.shared = shared_ids(seed)
        await self._prepare(endpoint, seed)
        with tempfile.TemporaryDirectory(prefix="aiosessions-") as name, ExitStack() as stack:
            directory = Path(name)
            workers: list[subprocess.Popen[str]] = []
            epoch = time.monotonic()
            for number in range(self.form.workers):
                settings = WorkerSettings(
                    endpoint=endpoint,
                    seed=seed,
                    worker=number,
                    workers=self.form.workers,
                    epoch=epoch,
                    clients=self.form.clients,
                    timeout=timeout,
                    loop=self.form.loops[number % len(self.form.loops)],
                    connections=1 + (number == self.form.workers - 1),
                    retry_after=retry_after,
                    history=str(_history(directory, number)),
                    secrets=[*secrets],
                    steps=[*steps] if number == 0 else [],
                )
                errors = stack.enter_context(_errors(directory, number).open("wb"))
                workers.append(stack.enter_context(start_worker(settings, errors)))
                stack.callback(workers[-1].kill)
            self._check(directory, await asyncio.to_thread(begin, workers))
            self._began = time.monotonic()
            await self.wait()
            yield
            await self.wait()
            self._ended = time.monotonic()
            self._check(directory, await asyncio.to_thread(end, workers))
            for worker in range(self.form.workers):
                self._events += history.read(_history(directory, worker))
        self._final = await asyncio.to_thread(stored, servers())

    @staticmethod
    def _check(directory: Path, failed: list[int]) -> None:
        for number in failed:
            raise WorkerError(_errors(directory, number).read_text("utf-8")[-4_000:])

    async def _prepare(self, endpoint: Endpoint, seed: str) -> None:
        async with open_storage(endpoint, timeout=_PATIENCE, ttl=600.0) as storage:
            recording = RecordingStorage(
                storage, self._events.append, number=-1, timeout=_PATIENCE, lag=LoopLag()
            )
            await prepare(recording, seed)

    def result(self, scenario: Scenario) -> ScenarioResult:
        """Judge the run."""
        verdict = check(
            self._events,
            self._final,
            loses=(self._broken[0], self._mended[0]) if scenario.loses else None,
            replicated=self.replicated,
        )
        return ScenarioResult(
            name=scenario.name,
            title=scenario.title,
            seconds=round(self._ended - self._began, 1),
            calls=verdict.calls,
            acknowledged=verdict.acknowledged,
            errors=dict(sorted(verdict.errors.items())),
            doubts=dict(sorted(verdict.doubts.items())),
            applied=verdict.applied,
            wrong=len(verdict.wrong),
            lost=len(verdict.lost),
            may_lose=scenario.loses,
            recovery=[round(seconds, 3) for seconds in self._recovery()],
            timeout=self._timeout,
            latest=round(verdict.latest, 3),
            notes=self.notes,
            problems=self._problems(scenario, verdict),
        )

    def _windows(self) -> list[tuple[float, float]]:
        """The times without a fault, each from the end of a fault to the next one."""
        windows: list[tuple[float, float]] = []
        for begin in self._mended:
            later = (moment for moment in self._broken if moment > begin)
            windows.append((begin, min(later, default=self._ended)))
        return windows

    def _recovery(self) -> list[float]:
        return [self._recovered(*window) - window[0] for window in self._windows()]

    def _recovered(self, begin: float, end: float) -> float:
        """The time at which each client had been served again and errors had stopped."""
        first: dict[int, float] = {}
        last = begin
        for event in self._events:
            if begin < event.end < end:
                if event.unavailable:
                    last = max(last, event.end)
                else:
                    first[event.client] = min(first.get(event.client, end), event.end)
        clients = {event.client for event in self._events if event.client >= 0}
        return max(last, *(first.get(client, end) for client in clients))

    def _problems(self, scenario: Scenario, verdict: Verdict) -> list[str]:
        problems = [
            *self.problems,
            *(f"wrong, {n} times: {what}" for what, n in Counter(verdict.wrong).most_common(5)),
        ]
        if verdict.lost and not scenario.loses:
            problems.append(f"{len(verdict.lost)} acknowledged writes lost: {verdict.lost[:3]}")
        if verdict.doubts and not scenario.in_doubt:
            problems.append(f"in doubt, though nothing was: {dict(verdict.doubts)}")
        unmet = [*early(self._events, self._broken, self._timeout)]
        if scenario.bridged:
            unmet += unbridged(self._events)
        problems += [f"{what}, {times} times" for what, times in Counter(unmet).most_common(5)]
        causes = verdict.errors + verdict.doubts
        problems += [
            f"unexpected, {times} times: {text}"
            for text, times in causes.items()
            if not text.startswith(scenario.causes or "none")
        ]
        if not any(text.startswith(scenario.certain) for text in (*causes, "")):
            problems.append(f"no error has the cause: {scenario.certain}")
        for begin, end, text in self._forbidden:
            during = [e for e in self._events if begin < e.end and e.start < end]
            times = sum(e.unavailable and e.message.startswith(text) for e in during)
            if times:
                problems.append(f"{times} times, without a reason: {text}")
        for begin, end in self._windows():
            took = self._recovered(begin, end) - begin
            if took > scenario.recovers_within:
                problems.append(f"recovered after {took:.2f} s, not {scenario.recovers_within} s")
        return problems


async def execute(scenario: Scenario, form: LoadForm) -> ScenarioResult:
    """Run a scenario once."""
    run = Run(form)
    await scenario.happen(run)
    return run.result(scenario)


def _history(directory: Path, worker: int) -> Path:
    return directory / f"{worker}.history"


def _errors(directory: Path, worker: int) -> Path:
    return directory / f"{worker}.errors"


def start_worker(
    settings: WorkerSettings, errors: IO[bytes] | None = None
) -> subprocess.Popen[str]:
    """Start a process of the load.

    Args:
        settings: The settings of the process.
        errors: The file for its error output; None for that of this process.
    """
    return subprocess.Popen(  # noqa: S603 - our own module
        [sys.executable, "-m", "tests.faults.worker", msgspec.json.encode(settings).decode()],
        cwd=_ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
    )


def begin(workers: Sequence[subprocess.Popen[str]]) -> list[int]:
    """Wait until all processes are ready, and let them begin.

    Returns:
        The numbers of the processes that failed.
    """
    failed = [number for number, worker in enumerate(workers) if not _is_ready(worker)]
    if not failed:
        for worker in workers:
            _send_line(worker)
    return failed


def _is_ready(worker: subprocess.Popen[str]) -> bool:
    assert worker.stdout is not None
    return worker.stdout.readline() == "ready\n"


def end(workers: Sequence[subprocess.Popen[str]]) -> list[int]:
    """Let all processes end, and wait until they have ended.

    Returns:
        The numbers of the processes that failed.
    """
    for worker in workers:
        with suppress(BrokenPipeError):  # the process has ended, and its status tells
            _send_line(worker)
    return [number for number, worker in enumerate(workers) if worker.wait(_PATIENCE) != 0]


def _send_line(worker: subprocess.Popen[str]) -> None:
    assert worker.stdin is not None
    worker.stdin.write("\n")
    worker.stdin.flush()


def stored(servers: Sequence[Server]) -> dict[str, Found]:
    """Read the stored sessions without the library."""
    found: dict[str, Found] = {}
    for server in servers:
        with redis.Redis.from_url(server.url, single_connection_client=True) as client:
            with suppress(redis.ResponseError):  # the server is not in a cluster
                client.execute_command("READONLY")  # for a replica
            keys: list[bytes] = list(client.scan_iter(match=_PREFIX + b"*", count=1_000))
            for key in keys:
                record: Any = client.get(key)
                data = json.loads(record[_HEADER_BYTES:])["data"]
                found[key.removeprefix(_PREFIX).decode()] = Found(data["token"], data["count"])
    return found
