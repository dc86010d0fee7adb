"""A long load on a server that is disturbed now and then, to find growth.

`python -m tests.faults.soak --minutes N`, or `nox -s soak -- --minutes N`. The memory of a run does
not depend on its length: processes count their events, and sessions expire.
"""

import argparse
import asyncio
import statistics
import sys
import time
from collections import Counter
from collections.abc import Sequence

import msgspec

from aiosessions import new_session_id
from tests.support.machine import environment
from tests.support.servers import Server, binaries, running
from tests.support.topologies import asking, connections

from . import report
from .client import Endpoint
from .nemesis import demoted, disconnected, hanging, out_of_memory
from .report import Moment, SoakResults
from .worker import UsageSample, workers
from .workload import LoadForm

_FORM = LoadForm(workers=2, clients=8)
_NAME = "aiosessions"  # the client name of connections that a URL makes
_SAMPLE = 5.0
_FAULTS = (disconnected, hanging, out_of_memory, demoted)
_FAULT_EVERY = 20.0
_DOWN = 1.0  # the duration of a fault
_WARM_UP = 10.0  # minutes

# How much the last third after the warm-up may exceed the first: relatively, or absolutely in bytes
# or objects. Allocators and collectors are not exact to the byte.
_TOLERANCE = {"memory": (0.02, 1_048_576), "objects": (0.01, 500)}


async def soak(minutes: float) -> SoakResults:
    """Run a soak."""
    start = time.monotonic()
    latest = [UsageSample() for _ in range(_FORM.workers)]

    def receive(number: int, line: bytes) -> None:
        latest[number] = msgspec.json.decode(line, type=UsageSample)

    settings = {"timeout": 0.5, "ttl": 20.0, "pause": 0.02, "sample": _SAMPLE}
    with running(binaries()["valkey"]) as server:
        endpoint = Endpoint(url=server.url)
        async with workers(_FORM, endpoint, receive, seed=new_session_id(), **settings):
            moments, faults = await _watch(server, latest, start, minutes)
    errors = sum((Counter(each.errors) for each in latest), Counter[str]())
    flaws = [flaw for each in latest for flaw in each.flaws]
    warm_up = min(_WARM_UP, minutes / 2)
    figures, problems = judge(moments, warm_up=warm_up, connections=_FORM.workers + 1)
    problems += [f"wrong, {times} times: {what}" for what, times in Counter(flaws).items()]
    return SoakResults(
        environment=environment(),
        processes=_FORM.workers,
        callers=_FORM.clients,
        warm_up=warm_up,
        errors=dict(errors),
        flaws=flaws,
        faults=faults,
        moments=moments,
        figures=figures,
        problems=problems,
    )


async def _watch(
    server: Server, latest: Sequence[UsageSample], start: float, minutes: float
) -> tuple[list[Moment], int]:
    """Disturb the server now and then, and sample everything in between."""
    moments: list[Moment] = []
    faults = 0
    while (now := time.monotonic() - start) < minutes * 60:
        if now > (faults + 1) * _FAULT_EVERY:
            with _FAULTS[faults % len(_FAULTS)](server):
                await asyncio.sleep(_DOWN)
            faults += 1
        await asyncio.sleep(_SAMPLE - (time.monotonic() - start) % _SAMPLE + 0.5)
        if all(each.calls for each in latest):
            moments.append(_moment(server, latest, start))
            if len(moments) % 12 == 0:
                print(moments[-1], flush=True)  # noqa: T201
    return moments, faults


def _moment(server: Server, latest: Sequence[UsageSample], start: float) -> Moment:
    with asking(server) as client:
        server_memory = int(client.info("memory")["used_memory"])
    return Moment(
        minutes=round((time.monotonic() - start) / 60, 3),
        memory=round(statistics.fmean(each.memory for each in latest)),
        objects=round(statistics.fmean(each.objects for each in latest)),
        tasks=max(each.tasks for each in latest),
        files=max(each.files for each in latest),
        connections=connections(server, _NAME),
        calls=sum(each.calls for each in latest),
        errors=sum(sum(each.errors.values()) for each in latest),
        server_memory=server_memory,
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


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a soak; return 1 if anything grew or an expectation was broken."""
    parser = argparse.ArgumentParser(prog="nox -s soak --", description="Soak.")
    parser.add_argument("--minutes", type=float, default=30, help="the duration (default: 30)")
    parser.add_argument("--save", action="store_true", help="if it passes, update the page")
    options = parser.parse_args(arguments)
    found = asyncio.run(soak(options.minutes))
    for name, (first, last) in found.figures.items():
        print(f"{name + ':':<16}{first:>14,g}{last:>14,g}")  # noqa: T201
    print("\n".join(found.problems) or "flat")  # noqa: T201
    if options.save and not found.problems:
        report.save_soak(found)
    return bool(found.problems)


if __name__ == "__main__":
    sys.exit(main())
