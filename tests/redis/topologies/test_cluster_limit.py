"""A limit of sessions in a cluster, where callers look at the sessions at different moments."""

import asyncio

import pytest
from redis.asyncio import RedisCluster

from aiosessions import RedisStorage, SessionManager
from tests.support.topologies import Cluster


@pytest.mark.parametrize("sign_ins", [10, 20])
async def test_concurrent_sign_ins_end_at_the_limit(nodes: Cluster, sign_ins: int) -> None:
    """All callers see the sessions in one order, so they delete the same ones."""
    client = RedisCluster(host="127.0.0.1", port=nodes.nodes[0].port)
    async with RedisStorage(client, ttl=60) as storage:
        sessions = SessionManager(storage, max_per_principal=5)
        for number in range(10):
            principal = f"alice {number}"
            await asyncio.gather(*(sessions.create(principal=principal) for _ in range(sign_ins)))

            assert await sessions.count(principal) == 5
    await client.aclose()
