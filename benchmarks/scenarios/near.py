"""The near cache: hits, remote calls, latency, revocation, its price, and where it pays."""

import asyncio
import multiprocessing
import statistics
from collections.abc import Iterator
from contextlib import ExitStack, closing
from functools import partial
from itertools import product
from typing import Any, Final

from tests.support.proxy_process import proxy_process

from .. import cached
from ..cached import HIT, MISS, NO_CACHE, SILENT, THROUGH
from ..client import Job
from ..measure import Bench, Group, Samples, alone, rows_of
from ..owned import ON_CLUSTER
from ..results import Claim, Result, Row, judge, select, stat
from ..servers import MeasuredServer, targets
from ..tables import number
from ..ways import UNCHANGED
from ..workload import PREFIX
from .closed import exactly, sessions_on_cluster
from .server import costs

_RTTS_MS: Final = (1, 5)
_STALENESS: Final = (1, 5, 30)
_RATES: Final = (0.1, 1, 10)
_SUBSCRIBERS: Final = (0, 1, 10)
_BOUND: Final = 0.5
"""The `max_staleness` of a replica that hears no announcements, in seconds."""
_SILENCE: Final = "no announcements"


def near(bench: Bench) -> Result:
    """Measure on one server and, except on --url, revocation on a cluster, too."""
    rounds = 1 if bench.quick else min(bench.rounds, 6)
    claims: list[Claim] = []
    rows = [*_hits(bench, rounds, claims), *_calls(bench, rounds, claims)]
    copies = [alone(cached.memory, 10_000 if bench.quick else 100_000) for _ in range(rounds)]
    with (
        targets(bench.url) as (target, *_),
        sessions_on_cluster(bench, target.ids) as (cluster_url, _),
    ):
        wire = bench.wire({HIT: THROUGH[HIT]}, target)
        claims.append(exactly("A hit makes no remote call, counted on the wire", wire[0], 0))
        samples = _latencies(bench, target, rounds)
        urls = {"one server": target.url, _SILENCE: target.url}
        if cluster_url:
            urls["cluster"] = ON_CLUSTER + cluster_url
        rows += _revoked(bench, urls, rounds, claims)
        rows += _price(bench, target)
    timed = rows_of(samples)
    for row, (_, some) in zip(timed, samples, strict=True):
        row["mean_ms"] = stat(row["callers"] * 1000 / each.throughput for each in some)
    facts = {"copy_bytes": f"{statistics.median(copies):,.0f}"}
    rows += [*wire, *timed, *_pays(samples, claims, facts)]
    deviation = max(abs(row["deviation"]["median"]) for row in rows if "deviation" in row)
    (unannounced,) = select(rows, replica=_SILENCE)
    codec = select(rows, codec="JsonCodec")[0]
    decode_us, hit_us = (1e6 / codec[name]["median"] for name in ("decodes", "hits"))
    (announced,) = select(rows, replica="one server")
    facts |= {
        "deviation": f"{deviation:.1f}",
        "hits": number(codec["hits"]["median"]),
        "decode_us": f"{decode_us:.1f}",
        "over_decode_us": f"{hit_us - decode_us:.1f}",
        "revoked_p99_ms": f"{announced['p99_ms']['median']:.1f}",
        "unannounced_ms": f"{unannounced['longest_ms']['high']:.0f}",
        "bound_ms": f"{_BOUND * 1000:.0f}",
    }
    return bench.result(
        "near", rows, claims=claims, facts=facts, rounds=rounds, server=target.label
    )


def _hits(bench: Bench, rounds: int, claims: list[Claim]) -> Iterator[Row]:
    every = [alone(cached.hits, bench.seconds) for _ in bench.steps("hits", range(rounds))]
    for some in zip(*every, strict=True):
        names = ("hits", "decodes", "local_loads")
        figures = {name: stat(row[name] for row in some) for name in names}
        measured = [row["hits"] for row in some]
        claim, target = "Hits a second in one process, with decoding", "at least 300,000"
        claims.append(judge(claim, target, measured, (3e5).__le__, some[0]["codec"]))
        yield some[0] | figures


def _calls(bench: Bench, rounds: int, claims: list[Claim]) -> Iterator[Row]:
    """Count remote calls, and compare them with one for each `max_staleness` + 1 / rate."""
    deviations = []
    for staleness, rate in bench.steps("remote calls", [*product(_STALENESS, _RATES)]):
        formula = 1000 / (1 + rate * staleness)
        requests = 5_000 if bench.quick else 30_000
        measured = [cached.remote_calls(staleness, rate, requests, seed) for seed in range(rounds)]
        some = [100 * (each / formula - 1) for each in measured]
        deviations.append(some)
        labels = {"max_staleness": staleness, "rate": rate, "formula": stat([formula])}
        yield labels | {"per_thousand": stat(measured), "deviation": stat(some)}
    largest = [max(map(abs, some)) for some in zip(*deviations, strict=True)]
    claim = "Remote calls per 1,000 requests are 1,000 / (1 + rate x `max_staleness`)"
    claims.append(judge(claim, "within 2 % for 9 combinations", largest, (2.0).__ge__))


def _latencies(bench: Bench, target: MeasuredServer, rounds: int) -> Samples:
    """Measure without a cache and with several shares of hits, directly and through a proxy."""
    host, port = target.address
    with proxy_process(port, host) as proxy:
        urls = (target.url, target.through(proxy.port))
        direct, delayed = (
            [Job(way, target.label, url, target.ids) for way in THROUGH] for url in urls
        )
        groups = [Group(direct, bench.closed((1, 32)), {"rtt_ms": 0})]
        for rtt in _RTTS_MS:
            before = partial(proxy.set, round_trip=rtt / 1000)
            groups.append(Group(delayed, bench.closed((1,)), {"rtt_ms": rtt}, before, proxy.set))
        return bench.measure(groups, rounds)


def _revoked(bench: Bench, urls: dict[str, str], rounds: int, claims: list[Claim]) -> Iterator[Row]:
    """Measure the time from an acknowledged delete to the refusal by another process."""
    found: dict[str, list[list[list[float]]]] = {name: [] for name in urls}
    for _, name in bench.steps("revocation", [*product(range(rounds), urls)]):
        count = 5 if name == _SILENCE else 100 if bench.quick else 300
        found[name].append(_refusals(urls[name], count, announces=name != _SILENCE))
    for name, every in found.items():
        refused = [[each[0] for each in some] for some in every]
        p99 = [statistics.quantiles(some, n=100, method="inclusive")[98] for some in refused]
        if name == _SILENCE:
            claim = "Without announcements, the latest load that returns a deleted session begins"
            target, bound = f"within max_staleness, {_BOUND * 1000:.0f} ms", _BOUND * 1000
            accepted = [max(each[1] for each in some) for some in every]
            claims.append(judge(claim, target, accepted, bound.__ge__))
        else:
            claim = "Another process refuses a deleted session: p99 after the acknowledgement"
            claims.append(judge(claim, "under 5 ms", p99, (5.0).__gt__, name))
        p50 = stat(map(statistics.median, refused))
        yield {
            "replica": name,
            "p50_ms": p50,
            "p99_ms": stat(p99),
            "longest_ms": stat(map(max, refused)),
        }


def _refusals(url: str, count: int, *, announces: bool) -> list[list[float]]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    replica = context.Process(target=cached.refuse, args=(url, _BOUND, announces, theirs))
    replica.start()
    theirs.close()  # so that its end ends this process's wait
    try:
        return asyncio.run(cached.delete(url, count, ours))
    finally:
        ours.close()
        replica.join()


def _price(bench: Bench, target: MeasuredServer) -> Iterator[Row]:
    """Measure the costs of a compare-and-set with subscribers, and of its script without them."""
    # The clients do not share sessions, so that revisions do not conflict.
    jobs = [
        Job(way, target.label, target.url, target.ids[place::2])
        for place, way in enumerate((UNCHANGED, SILENT))
    ]
    for count in _SUBSCRIBERS:
        with ExitStack() as stack:
            for _ in range(count):
                pubsub: Any = target.direct.pubsub()  # type: ignore[no-untyped-call]
                subscriber = stack.enter_context(closing(pubsub))
                subscriber.subscribe(f"{PREFIX}changes")
                subscriber.get_message(timeout=5)
            for row in costs(bench, target, jobs, 1_000 if bench.quick else 5_000):
                yield row | {"subscribers": count}


def _pays(samples: Samples, claims: list[Claim], facts: dict[str, str]) -> Iterator[Row]:
    """Compute the share of hits from which a load takes less time with the cache than without."""

    def find(way: str, rtt: int, figure: str = "p50_ms", callers: int = 1) -> list[float]:
        wanted = {"way": way, "rtt_ms": rtt, "callers": callers}
        (some,) = [some for labels, some in samples if wanted.items() <= labels.items()]
        return [getattr(each, figure) for each in some]

    def shares(loads: list[float], misses: list[float], hits: list[float]) -> list[float]:
        every = zip(loads, misses, hits, strict=True)
        return [100 * max(0.0, miss - load) / (miss - hit) for load, miss, hit in every]

    hits, plain = find(HIT, 0), find(NO_CACHE, 0)
    # The overhead of a miss, which the noise of a slow link would hide.
    over = [miss - load for miss, load in zip(find(MISS, 0), plain, strict=True)]
    facts["hit_us"] = f"{1000 * statistics.median(hits):.1f}"
    facts["miss_over_us"] = f"{1000 * statistics.median(over):.0f}"
    for rtt in (0, *_RTTS_MS):
        loads = find(NO_CACHE, rtt)
        misses = [load + each for load, each in zip(loads, over, strict=True)]
        pays = shares(loads, misses, hits)
        saved = [
            load - (0.9 * hit + 0.1 * miss)
            for load, miss, hit in zip(loads, misses, hits, strict=True)
        ]
        facts[f"pays_at_{rtt}"] = number(statistics.median(pays))
        facts[f"saved_ms_at_{rtt}"] = f"{statistics.median(saved):.2f}"
        if rtt:
            claim = f"The near cache makes loads faster at {rtt} ms RTT"
            claims.append(judge(claim, "from 10 % of hits, or less", pays, (10.0).__ge__))
        yield {"link": f"+{rtt} ms", "load_ms": stat(loads), "saved_ms": stat(saved)} | {
            "pays": stat(pays)
        }
    cpu = shares(*(find(way, 0, "cpu_us", 32) for way in (NO_CACHE, MISS, HIT)))
    facts["pays_cpu"] = number(statistics.median(cpu))
    yield {"link": "CPU of the client, 32 callers", "pays": stat(cpu)}
