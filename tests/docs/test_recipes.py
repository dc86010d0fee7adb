"""The functions of docs/recipes.md on two replicas that share one server."""

import ast
import asyncio
import re
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from aiosessions import LocalStorage, SessionManager, SessionNotFound
from tests.support.clients import storage_at, turns
from tests.support.servers import Server
from tests.support.storages import InterceptedStorage

PAGE = Path(__file__).parents[2] / "docs" / "recipes.md"
ROUNDS = 50
TTL = 60

Replicas = Callable[[str], list[SessionManager[Any]]]


def recipe(section: str) -> Any:
    """The functions of a section, without the program that shows them."""
    pattern = rf"^## {section}\n.*?^```python\n(.*?)^```"
    block = re.search(pattern, PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    assert block, section
    program = ast.parse(block[1])
    kinds = ast.Import, ast.ImportFrom, ast.FunctionDef, ast.AsyncFunctionDef
    program.body = [node for node in program.body if isinstance(node, kinds)]
    namespace: dict[str, Any] = {}
    exec(compile(program, PAGE, "exec"), namespace)  # noqa: S102 - our own documentation
    return SimpleNamespace(**namespace)


@pytest.fixture
async def replicas(valkey: Server) -> AsyncIterator[Replicas]:
    """Makes the managers of two replicas under a prefix."""
    valkey.flush()
    async with AsyncExitStack() as stack:
        storages = {
            prefix: [
                await stack.enter_async_context(
                    storage_at(valkey.url, ttl=TTL, key_prefix=f"{prefix}:")
                )
                for _ in range(2)
            ]
            for prefix in ("token", "lease", "result")
        }
        yield lambda prefix: [SessionManager(storage) for storage in storages[prefix]]


async def test_one_replica_consumes_a_token(replicas: Replicas) -> None:
    """Two replicas race for each token, and one gets its data."""
    page, (one, two) = recipe("Consume once"), replicas("token")
    for number in range(ROUNDS):
        token = await one.create(data=number)
        found = await asyncio.gather(page.consume(one, token.id), page.consume(two, token.id))
        assert sorted(found, key=str) == [number, None]


async def test_one_replica_gets_a_lease(replicas: Replicas) -> None:
    """Two replicas race for the lease in each round, and the holder releases it."""
    page, both = recipe("A lease"), replicas("lease")
    for _ in range(ROUNDS):
        [lease] = filter(None, await asyncio.gather(*(page.acquire(each, "job") for each in both)))
        await page.release(both[0], lease)


async def test_lease_of_dead_process_is_taken_over(valkey: Server, replicas: Replicas) -> None:
    """Attempts to acquire it do not prolong it. The former holder cannot renew or release it."""
    page, (one, two) = recipe("A lease"), replicas("lease")
    dead = await page.acquire(one, "job")
    valkey.age(TTL - 10)
    assert await page.acquire(two, "job") is None
    valkey.age(10)
    lease = await page.acquire(two, "job")
    assert lease is not None
    assert not await page.renew(one, dead)
    await page.release(one, dead)
    assert await page.renew(two, lease)


async def test_replicas_share_one_computation(replicas: Replicas) -> None:
    """Each round has one computation for four callers on two replicas."""
    page = recipe("Single flight")
    pairs = list(zip(replicas("lease"), replicas("result"), strict=True))
    for number in range(ROUNDS):
        runs: list[int] = []

        async def compute(number: int = number, runs: list[int] = runs) -> str:
            runs.append(number)
            await turns(3)
            return str(number)

        calls = (page.single_flight(*pair, f"key-{number}", compute) for pair in pairs * 2)
        assert set(await asyncio.gather(*calls)) == {str(number)}
        assert runs == [number]


@pytest.mark.parametrize("point", range(3))
async def test_late_caller_computes_nothing(point: int) -> None:
    """Another caller begins and ends before this one has the lease."""
    page = recipe("Single flight")
    storages = LocalStorage[Any](ttl=TTL), LocalStorage[Any](ttl=TTL)
    points = runs = 0

    async def compute() -> str:
        nonlocal runs
        runs += 1
        return "fine"

    async def another(*_: object) -> None:
        nonlocal points
        points += 1
        if points == point + 1:
            await page.single_flight(*map(SessionManager, storages), "key", compute)

    intercepted = [InterceptedStorage(storage) for storage in storages]
    for storage in intercepted:
        storage.intercept(another)
    assert await page.single_flight(*map(SessionManager, intercepted), "key", compute) == "fine"
    assert runs == 1


async def test_failed_computation_is_repeated(replicas: Replicas) -> None:
    """Its caller gets the error, and another caller computes the result."""
    page = recipe("Single flight")
    pairs = zip(replicas("lease"), replicas("result"), strict=True)
    outcomes: list[Any] = [OSError("down"), "fine"]

    async def compute() -> Any:
        outcome = outcomes.pop(0)
        if isinstance(outcome, OSError):
            raise outcome
        return outcome

    calls = (page.single_flight(*pair, "key", compute) for pair in pairs)
    ends = await asyncio.gather(*calls, return_exceptions=True)
    assert sorted(map(str, ends)) == ["down", "fine"]


@pytest.mark.parametrize("point", range(12))
async def test_no_visit_outlives_sign_out_everywhere(point: int) -> None:
    """A token opens a session, while its owner signs out before or after any of the calls."""
    page = recipe('Two lifetimes: "remember me"')
    storages = LocalStorage[Any](ttl=TTL), LocalStorage[Any](ttl=TTL)
    sessions, tokens = map(SessionManager, storages)
    points = 0

    async def sign_out(*_: object) -> None:
        nonlocal points
        points += 1
        if points == point + 1:
            await page.sign_out_everywhere(sessions, tokens, "alice")

    intercepted = [InterceptedStorage(storage) for storage in storages]
    for storage in intercepted:
        storage.intercept(sign_out)
    token = await tokens.create(principal="alice")

    with suppress(SessionNotFound):
        await page.visit(*map(SessionManager, intercepted), "expired", token.id)

    assert points > point
    assert await sessions.count("alice") == 0
    assert await tokens.count("alice") == 0
