"""A long load on a server that is disturbed now and then, to find growth.

Invariant: the memory of a run does not depend on its length. Events are counted and not kept, and
sessions expire, so the memory of the server must be flat, too.
"""

import statistics
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import msgspec

from aiosessions import new_session_id
from benchmarks.machine import environment
from tests.support.loops import LOOPS
from tests.support.servers import Server, binaries, refused_port, running
from tests.support.topologies import ask, asking, connections

from .report import Moment, SoakResults
from .run import begin, end, start_worker
from .worker import UsageSample
from .workload import Endpoint, WorkerSettings

PROCESSES = 2
CLIENTS = 8

_NAME = "aiosessions"  # the client name of connections that a URL makes
_TIMEOUT = 0.5
_TTL = 20.0
_PAUSE = 0.02
_SAMPLE = 5.0
_FAULT_EVERY = 20.0
_WARM_UP = 10.0  # minutes
_DOWN = 1.0  # the duration of a fault

# How much the last third after the warm-up may exceed the first: relatively, or absolutely in bytes
# or objects. Allocators and collectors are not exact to the byte.
_TOLERANCE = {"memory": (0.02, 1_048_576), "objects": (0.01, 500)}


def soak(minutes: float, say: Callable[[str], None]) -> SoakResults:
    """Run a soak."""
    with ExitStack() as stack:
        server = stack.enter_context(running(binaries()["valkey"]))
        epoch = time.monotonic()
        seed = new_session_id()
        workers: list[subprocess.Popen[str]] = []
        for number in range(PROCESSES):
            settings = WorkerSettings(
                endpoint=Endpoint(url=server.url),
                seed=seed,
                worker=number,
                workers=PROCESSES,
                epoch=epoch,
                clients=CLIENTS,
                timeout=_TIMEOUT,
                loop=[*LOOPS][number % len(LOOPS)],
                ttl=_TTL,
                pause=_PAUSE,
                sample=_SAMPLE,
            )
            workers.append(stack.enter_context(start_worker(settings)))
            stack.callback(workers[-1].kill)
        failed = begin(workers)
        samples: list[list[UsageSample]] = [[] for _ in workers]
        readers = [
            threading.Thread(target=_collect, args=pair, daemon=True)
            for pair in zip(workers, samples, strict=True)
        ]
        for reader in readers:
            reader.start()
        moments, disturbances = _watch(server, samples, epoch, minutes, say)
        failed += end(workers)
        for reader in readers:
            reader.join()
    warm_up = min(_WARM_UP, minutes / 2)
    errors: Counter[str] = Counter()
    for each in samples:
        errors.update(each[-1].errors)
    flaws = [flaw for each in samples for flaw in each[-1].flaws]
    figures, problems = judge(moments, warm_up=warm_up, connections=PROCESSES)
    problems += [f"process {number} failed" for number in failed]
    problems += [f"wrong, {times} times: {what}" for what, times in Counter(flaws).items()]
    return SoakResults(
        environment=environment("redis", "hiredis"),
        processes=PROCESSES,
        callers=CLIENTS,
        warm_up=warm_up,
        errors=dict(errors),
        flaws=flaws,
        faults=disturbances,
        moments=moments,
        figures=figures,
        problems=problems,
    )


def _collect(worker: subprocess.Popen[str], samples: list[UsageSample]) -> None:
    assert worker.stdout is not None
    for line in worker.stdout:
        samples.append(msgspec.json.decode(line, type=UsageSample))  # noqa: PERF401 - as they come


def _watch(
    server: Server,
    samples: Sequence[Sequence[UsageSample]],
    epoch: float,
    minutes: float,
    say: Callable[[str], None],
) -> tuple[list[Moment], int]:
    """Disturb the server now and then, and sample everything in between."""
    moments: list[Moment] = []
    faults = 0
    while (now := time.monotonic() - epoch) < minutes * 60:
        if now > (faults + 1) * _FAULT_EVERY:
            with _FAULTS[faults % len(_FAULTS)](server):
                time.sleep(_DOWN)
            faults += 1
        time.sleep(_SAMPLE - (time.monotonic() - epoch) % _SAMPLE + 0.5)
        if all(samples):
            moments.append(_moment(server, [each[-1] for each in samples], epoch))
            if len(moments) % 12 == 0:
                say(_line(moments[-1]))
    return moments, faults


def _moment(server: Server, latest: Sequence[UsageSample], epoch: float) -> Moment:
    with asking(server) as client:
        server_memory = int(client.info("memory")["used_memory"])
    return Moment(
        minutes=round((time.monotonic() - epoch) / 60, 3),
        memory=round(statistics.fmean(each.memory for each in latest)),
        objects=round(statistics.fmean(each.objects for each in latest)),
        tasks=max(each.tasks for each in latest),
        files=max(each.files for each in latest),
        connections=connections(server, _NAME),
        calls=sum(each.calls for each in latest),
        errors=sum(sum(each.errors.values()) for each in latest),
        server_memory=server_memory,
    )


def _line(moment: Moment) -> str:
    return (
        f"{moment.minutes:6.1f} min  {moment.calls:10,} calls  {moment.errors:7,} errors  "
        f"{moment.memory / 1e6:6.1f} MB  {moment.objects:8,.0f} objects  {moment.tasks:3} tasks  "
        f"{moment.connections} connections"
    )


def judge(
    moments: Sequence[Moment], *, warm_up: float, connections: int
) -> tuple[dict[str, tuple[float, float]], list[str]]:
    """Compare the first and the last third after the warm-up.

    Returns:
        The medians of both by name, and the broken expectations.
    """
    settled = [each for each in moments if each.minutes >= warm_up]
    third = max(1, len(settled) // 3)
    figures: dict[str, tuple[float, float]] = {}
    problems: list[str] = []
    for name in ("memory", "objects", "tasks", "files", "connections", "server_memory"):
        first, last = (
            statistics.median(getattr(each, name) for each in part)
            for part in (settled[:third], settled[-third:])
        )
        figures[name.replace("_", " ")] = (first, last)
        part, whole = _TOLERANCE.get(name, (0.0, 0))
        if name != "server_memory" and last - first > max(part * first, whole):
            problems.append(f"{name} grew from {first:,g} to {last:,g}")
    if figures["connections"][1] != connections:
        problems.append(f"{figures['connections'][1]:g} connections, not {connections}")
    return figures, problems


@contextmanager
def _killing(server: Server) -> Iterator[None]:
    for _ in range(5):
        ask(server, "CLIENT", "KILL", "TYPE", "normal")
        time.sleep(0.1)
    yield


@contextmanager
def _hanging(server: Server) -> Iterator[None]:
    server.pause()
    yield
    server.resume()


@contextmanager
def _full(server: Server) -> Iterator[None]:
    ask(server, "CONFIG", "SET", "maxmemory", 1)
    yield
    ask(server, "CONFIG", "SET", "maxmemory", 0)


@contextmanager
def _demoted(server: Server) -> Iterator[None]:
    with refused_port() as master:
        ask(server, "REPLICAOF", "127.0.0.1", master)
        yield
        ask(server, "REPLICAOF", "NO", "ONE")


_FAULTS = (_killing, _hanging, _full, _demoted)
