"""Codecs and `LocalStorage` in this process: pyperf times them, another process sees pauses."""

import asyncio
import gc
import math
import subprocess
import sys
import tempfile
import time
from array import array
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import pyperf

from ..measure import Bench, alone
from ..micro import Clock, filled
from ..results import Result, Row, select, stat
from ..workload import TTL, sealed, session

_SIZES = (1_000, 10_000, 100_000, 1_000_000)
_CODEC_SIZES = (200, 1_000, 10_000, 50_000)
_QUICK = ("--processes=1", "--values=3", "--warmups=1", "--min-time=0.005")
_FULL = ("--processes=3", "--values=5", "--warmups=1", "--min-time=0.02")


def _timed(bench: Bench, what: str, size: int) -> list[tuple[dict[str, Any], dict[str, float]]]:
    """Run `micro` under pyperf: the labels of each timing, and its microseconds."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "timings.json")
        command = [sys.executable, "-m", "benchmarks.micro", f"--what={what}", f"--size={size}"]
        command += [*(_QUICK if bench.quick else _FULL), "--quiet"]
        command += ["--inherit-environ=PYTHONPATH", f"--output={path}"]
        # Its output are warnings about noise, which the spread shows.
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)  # noqa: S603 - ourselves
        suite = pyperf.BenchmarkSuite.load(str(path))
    return [
        (each.get_metadata(), stat(value * 1e6 for value in each.get_values()))
        for each in suite.get_benchmarks()
    ]


def codecs(bench: Bench) -> Result:
    """Measure codecs, one size of the session after another."""
    rows: list[Row] = []
    for size in bench.steps("codecs", _CODEC_SIZES[:2] if bench.quick else _CODEC_SIZES):
        for labels, us in _timed(bench, "codecs", size):
            row = {"codec": labels["codec"], "size": size, "payload_bytes": labels["payload"]}
            rows.append(row | {"does": labels["does"], "us": us})
    known = select(rows, size=_CODEC_SIZES[1])
    medians = {(row["codec"], row["does"]): row["us"]["median"] for row in known}
    facts = {
        f"json_over_jsoncodec_{does}": f"{medians['json', does] / medians['JsonCodec', does]:.1f}"
        for does in ("encode", "decode")
    }
    packages = ("orjson", "pyperf")
    return bench.result(
        "codecs", rows, facts=facts, packages=packages, rounds="pyperf's", seconds=None
    )


def local(bench: Bench) -> Result:
    """Measure `LocalStorage` with one number of sessions after another, the largest once."""
    rounds = min(bench.rounds, 3)
    rows: list[Row] = []
    for size in bench.steps("local storage", _SIZES[:2] if bench.quick else _SIZES):
        row: Row = {"sessions": size}
        row |= {f"{labels['does']}_us": us for labels, us in _timed(bench, "local", size)}
        # Processes of their own, because the memory of one includes earlier sizes.
        times = 1 if size == _SIZES[-1] else rounds
        measured = [alone(_measure, size) for _ in range(times)]
        row |= {name: stat(each[name] for each in measured) for name in measured[0]}
        rows.append(row | {"measured": len(measured)})
    facts = {"record_bytes": str(len(sealed(session())))}
    packages = ("psutil", "pyperf")
    return bench.result("local", rows, facts=facts, packages=packages, rounds=rounds, seconds=None)


def _measure(size: int) -> Row:
    return asyncio.run(_sweep(size))


async def _sweep(size: int) -> Row:
    """Fill a storage, let all sessions expire, and sweep them."""
    clock = Clock()
    await filled(1, clock)  # imports a backend
    gc.collect()
    empty = psutil.Process().memory_info().rss
    storage, _ = await filled(size, clock)
    full = psutil.Process().memory_info().rss
    clock.ahead += 2 * TTL
    idle, _ = await _pauses(lambda: asyncio.sleep(0.2))
    pauses, sweeping = await _pauses(storage.delete_expired)
    return {
        "sweep_us": sweeping * 1e6 / size,
        "bytes": (full - empty) / size,
        "pause_p99_ms": sorted(pauses)[math.ceil(len(pauses) * 0.99) - 1] * 1000,
        "pause_ms": max(pauses) * 1000,
        "idle_pause_ms": max(idle) * 1000,
    }


async def _pauses(action: Callable[[], Awaitable[object]]) -> tuple[Sequence[float], float]:
    """Measure the waits of another task while an action runs.

    The turns of the other task make the action a little longer.
    """
    # Allocated before, because an allocation changes when memory returns to the system.
    waits = array("d", bytes(8 * 1_000_000))
    turns = 0

    async def watch() -> None:
        nonlocal turns
        last = time.perf_counter()
        while True:
            await asyncio.sleep(0)
            now = time.perf_counter()
            waits[turns] = now - last
            turns += 1
            last = now

    gc.collect()
    watcher = asyncio.create_task(watch())
    await asyncio.sleep(0)
    start = time.perf_counter()
    await action()
    elapsed = time.perf_counter() - start
    await asyncio.sleep(0)
    watcher.cancel()
    await asyncio.wait([watcher])
    return waits[:turns], elapsed
