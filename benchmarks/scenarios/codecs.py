"""The codecs beside msgspec alone, json, orjson and pickle, timed by pyperf."""

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pyperf

from ..codec_timings import SIZES
from ..measure import Bench
from ..results import Result, Row, stat

_DOES = ("encode", "decode")
_QUICK = ("--processes=1", "--values=3", "--warmups=1", "--min-time=0.005")
_FULL = ("--processes=3", "--values=5", "--warmups=1", "--min-time=0.02")


def run(bench: Bench) -> Result:
    """Measure one size after another."""
    quick = bench.settings.quick
    rows: list[Row] = []
    for size in bench.steps("codecs", SIZES[:2] if quick else SIZES):
        bench.steadiness.probe()
        rows += _timed(size, _QUICK if quick else _FULL)
    return bench.result(
        "codecs",
        rows,
        packages=["orjson", "pyperf"],
        facts={
            **{
                f"json_over_jsoncodec_{does}": _times(rows, does, "json", "JsonCodec")
                for does in _DOES
            },
            "jsoncodec_over_msgspec_encode": _times(rows, "encode", "JsonCodec", "msgspec"),
        },
        rounds="pyperf's",
        seconds=None,
    )


def _timed(size: int, options: tuple[str, ...]) -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "timings.json")
        subprocess.run(  # noqa: S603 - ourselves
            [
                *(sys.executable, "-m", "benchmarks.codec_timings", f"--sizes={size}"),
                *(*options, "--quiet", "--inherit-environ=PYTHONPATH", f"--output={path}"),
            ],
            check=True,
            stdout=subprocess.DEVNULL,  # pyperf's warnings; the results have the spread
        )
        suite = pyperf.BenchmarkSuite.load(str(path))
    return [_row(benchmark) for benchmark in suite.get_benchmarks()]


def _row(benchmark: Any) -> Row:
    metadata = benchmark.get_metadata()
    return {
        "codec": metadata["codec"],
        "size": metadata["size"],
        "payload_bytes": metadata["payload"],
        "does": metadata["does"],
        "us": stat(value * 1e6 for value in benchmark.get_values()),
    }


def _times(rows: list[Row], does: str, slower: str, faster: str) -> str:
    """The time of one codec over that of another, at 1 KB."""
    medians = {
        row["codec"]: row["us"]["median"]
        for row in rows
        if row["does"] == does and row["size"] == SIZES[1]
    }
    return f"{medians[slower] / medians[faster]:.1f}"
