"""Sessions of web applications: speed, commands, races, and visits of bots.

One application runs on each library, as in `web_apps`, and real HTTP requests reach it. The latency
of the same application without sessions, in the same round, is subtracted. The races:

- A user logs in, which takes 10 ms. Another page of that user takes 30 ms and changes the session.
- A user adds 8 items to a cart within 30 ms. Each addition takes 10 ms.

A change is lost if it was answered with 200 and is not in the session afterwards.
"""

import asyncio
import json
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Final

from ..browser import BOT, CHANGED, KINDS, READ, UNTOUCHED, WEB, Browser, Client, Reply
from ..client import Job, Run
from ..measure import Bench, Group, Samples, rows_of
from ..results import CONFIRMED, REFUTED, Claim, Result, Row, select, stat
from ..servers import MeasuredServer, targets
from ..web_apps import APPS, OURS, OURS_LAZY, PACKAGES, served
from .closed import exactly

CONNECTIONS: Final = (1, 32)
RACES: Final = 1_000
"""Races of each kind, and visits of bots."""

_ADDITIONS: Final = 8
_AT_ONCE: Final = 8
_MUTATE: Final = f"{OURS}, mutate"


def web(bench: Bench) -> Result:
    """Measure every application on one server."""
    rounds, races = (1, 10) if bench.quick else (min(bench.rounds, 5), RACES)
    with targets(bench.url) as (target, *_):
        raced = _races(bench, target, races)  # first, because it counts the keys of the server
        counted = [Run(kind, times=20) for kind in (*KINDS, BOT)]
        wire = bench.wire({name: WEB[name] for name in APPS}, target, counted, "kind")
        browsers = target.ids[: max(CONNECTIONS)]
        jobs = [Job(name, target.label, target.url, browsers, "uvloop") for name in WEB]
        groups = [Group(jobs, bench.closed(CONNECTIONS, kind), {"kind": kind}) for kind in KINDS]
        samples = bench.measure(groups, rounds)
    for row in wire:
        commands = row["commands"]
        row["cost"] = f"{row['round_trips']}: {commands}" if commands else "0"
    measured = _with_added(samples)
    return bench.result(
        "web",
        [*wire, *measured, *raced],
        claims=[*_claims(wire, raced, races)],
        facts={"races": f"{races:,}"} | _facts(measured),
        packages=PACKAGES,
        rounds=rounds,
        races=races,
    )


def _with_added(samples: Samples) -> list[Row]:
    """Rows with the latency that sessions add, taken within each round."""
    latencies = {
        (row["way"], row["kind"], row["callers"]): [each.p50_ms for each in some]
        for row, some in samples
    }
    rows = rows_of(samples)
    for row in rows:
        way, *cell = row["way"], row["kind"], row["callers"]
        if way in APPS and (alone := latencies.get((APPS[way].framework, *cell))):
            pairs = zip(latencies[way, *cell], alone, strict=True)
            row["added_ms"] = stat(with_sessions - without for with_sessions, without in pairs)
    return rows


def _facts(measured: list[Row]) -> dict[str, str]:
    """The latency that each kind of request gains with aiosessions, for one connection."""
    return {
        f"added_{row['kind'].replace(' ', '_')}_ms": f"{row['added_ms']['median']:.2f}"
        for row in select(measured, way=OURS, callers=1)
        if "added_ms" in row
    }


def _races(bench: Bench, target: MeasuredServer, races: int) -> list[Row]:
    """Run the races, and let bots visit."""
    rows: list[Row] = []
    for name in bench.steps("races", [name for name in APPS if name != OURS_LAZY]):
        with ExitStack() as stack:
            try:
                port = stack.enter_context(served(name, target.url))
            except ImportError as error:
                bench.missing[f"races of {name}"] = str(error)
                continue
            before = target.direct.dbsize()
            asyncio.run(_bots(port, races))
            stored = {"bot_sessions": target.direct.dbsize() - before}
            for way, add in ((name, "add"), (_MUTATE, "append"))[: 2 if name == OURS else 1]:
                counts = asyncio.run(_run(port, races, add))
                rows.append({"way": way} | stored | dict(counts))
    return rows


async def _bots(port: int, visits: int) -> None:
    """Visit a page that reads the session, each time without a cookie."""
    client = Client(port)
    for _ in range(visits):
        await Browser(client).get("read")
    client.close()


async def _run(port: int, races: int, add: str) -> Counter[str]:
    """Run races, some of them at once, each with a new user."""
    client, rng = Client(port), random.Random(1)  # noqa: S311 - moments, not secrets
    counts = Counter(dict.fromkeys(("logins", "lost_logins", "additions", "lost_additions"), 0))
    numbers = iter(range(races))

    async def run_some() -> None:
        for number in numbers:
            browser = Browser(client)
            await browser.get("change")
            delays = [rng.uniform(0, 0.03) for _ in range(_ADDITIONS)]
            counts.update(await _add_at_once(browser, add, delays))
            counts.update(await _log_in_beside_a_page(browser, f"user-{number}"))

    await asyncio.gather(*(run_some() for _ in range(_AT_ONCE)))
    client.close()
    return counts


async def _add_at_once(browser: Browser, add: str, delays: Sequence[float]) -> dict[str, int]:
    async def one(item: int, delay: float) -> Reply:
        await asyncio.sleep(delay)
        return await browser.get(f"{add}?value={item}&work=0.01")

    replies = await asyncio.gather(*(one(*each) for each in enumerate(delays)))
    added = {str(item) for item, reply in enumerate(replies) if reply.status == 200}
    there = json.loads((await browser.get("show")).body)["items"]
    return {"additions": len(added), "lost_additions": len(added.difference(there))}


async def _log_in_beside_a_page(browser: Browser, user: str) -> dict[str, int]:
    login, _ = await asyncio.gather(
        browser.get(f"sign-in?value={user}&work=0.01"), browser.get("page?value=orders&work=0.03")
    )
    answered = login.status == 200
    there = json.loads((await browser.get("show")).body)["user"] == user
    return {"logins": answered, "lost_logins": answered and not there}


def _claims(wire: list[Row], raced: list[Row], races: int) -> Iterator[Claim]:
    for way, kind, request, trips in (
        (OURS_LAZY, UNTOUCHED, "leaves its session untouched, with lazy=True", 0),
        (OURS, BOT, "has no cookie and stores nothing", 0),
        (OURS, READ, "reads its session", 1),
        (OURS, CHANGED, "changes its session", 2),
    ):
        for row in select(wire, way=way, kind=kind):
            yield exactly(f"Round trips of a request that {request}", row, trips)
    rows = {row["way"]: row for row in raced}
    ours, mutate = rows[OURS], rows[_MUTATE]
    additions = _ADDITIONS * races
    for claim, expected, counted in (
        ("Logins beside a slower page, kept", races, ours["logins"] - ours["lost_logins"]),
        (
            "Additions at once by `mutate`, kept",
            additions,
            mutate["additions"] - mutate["lost_additions"],
        ),
        ("Additions answered 200 without `mutate`, lost", 0, ours["lost_additions"]),
        (f"Sessions stored by {races:,} visits without a cookie", 0, ours["bot_sessions"]),
    ):
        of = f" of {expected:,}" if expected else ""
        verdict = CONFIRMED if counted == expected else REFUTED
        yield Claim(claim, f"{expected:,}{of}", "", f"{counted:,}{of}", verdict)
