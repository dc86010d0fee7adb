"""Memory over many loads: growth would end a service."""

from ..client import Job, Run
from ..measure import Bench
from ..results import Result, Row, judge
from ..servers import targets
from ..ways import OURS

_CALLERS = 256
_READINGS = 100
_GROWTH_MB = 2.0


def memory(bench: Bench) -> Result:
    """Load for minutes, and read the memory of the process at intervals."""
    loads = 100_000 if bench.quick else 10_000_000
    share = loads // _READINGS
    rows: list[Row] = []
    with targets(bench.url) as (target, *_):
        job = Job(OURS, target.label, target.url, target.ids)
        with bench.clients([job]) as (client,):
            for number in bench.steps(f"{loads:,} loads", range(_READINGS)):
                measured = client.measure(Run(callers=_CALLERS, times=share))
                rows.append({"loads": (number + 1) * share, "rss_mb": round(measured.rss_mb, 3)})
    # The first tenth fills caches, free lists and buffers.
    growth = rows[-1]["rss_mb"] - rows[_READINGS // 10]["rss_mb"]
    claim = judge(
        f"Memory is flat over {loads:,} loads",
        f"grows by at most {_GROWTH_MB} MB after the first tenth",
        [growth],
        lambda megabytes: megabytes <= _GROWTH_MB,
    )
    facts = {"loads": f"{loads:,}", "growth_mb": f"{growth:.2f}"}
    return bench.result("memory", rows, claims=[claim], facts=facts, rounds=1, seconds=None)
