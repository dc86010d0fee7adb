"""The client's side of the demo: the SDK's client over a transport that chooses a replica."""

import asyncio
import json
from collections import Counter, defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import httpx
from mcp import ClientSession
from mcp.client.session import ElicitationFnT
from mcp.client.streamable_http import streamable_http_client
from processes import Service
from redis.asyncio import Redis

# INFO and DBSIZE come from the demo. The next ones introduce a new connection. With the last two, a
# replica subscribes to changes, and looks whether a silent server is still there.
_NOT_COUNTED = {"info", "dbsize", "hello", "auth", "select", "subscribe", "ping"}


@dataclass(frozen=True)
class Exchange:
    """A request, the replica that answered it, and the commands that Valkey ran for it."""

    request: httpx.Request
    proxy: Service
    response: httpx.Response
    commands: list[str]


class Balancer(httpx.AsyncBaseTransport):
    """Sends each request to the replica `proxy`, as a load balancer would.

    `INFO commandstats` is read before each request and after the headers of its response. At that
    time the proxy is done with the store. Requests run one at a time up to then, so the difference
    is the cost of the request.
    """

    def __init__(self, store: Redis, proxy: Service) -> None:
        self.proxy = proxy
        self.store: Redis | None = store  # None when it is down
        self._exchanges: defaultdict[str, asyncio.Queue[Exchange]] = defaultdict(asyncio.Queue)
        self._one_at_a_time = asyncio.Lock()
        self._network = httpx.AsyncHTTPTransport()

    async def next(self, kind: str) -> Exchange:
        """Wait for the next exchange of a kind: a method of MCP, "answer", "GET" or "DELETE"."""
        async with asyncio.timeout(10):
            return await self._exchanges[kind].get()

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request to the chosen replica; httpx calls this method."""
        kind = request.method
        if kind == "POST":
            kind = json.loads(request.content).get("method", "answer")
        async with self._one_at_a_time:
            proxy = self.proxy
            before = await self.count()
            response = await self._network.handle_async_request(
                httpx.Request(
                    request.method,
                    proxy.url,
                    headers=request.headers,
                    stream=request.stream,
                    extensions=request.extensions,
                )
            )
            commands = sorted((await self.count() - before).elements())
        if response.is_error:
            await response.aread()
        self._exchanges[kind].put_nowait(Exchange(request, proxy, response, commands))
        return response

    async def count(self) -> Counter[str]:
        """How often the store has run each command."""
        stats = await self.store.info("commandstats") if self.store else {}
        calls = {name.removeprefix("cmdstat_"): each["calls"] for name, each in stats.items()}
        ignored = _NOT_COUNTED | {name for name in calls if name.startswith("client|")}
        return Counter({name: calls[name] for name in calls.keys() - ignored})

    async def aclose(self) -> None:
        """Close the connections."""
        await self._network.aclose()


@asynccontextmanager
async def connected(http: httpx.AsyncClient, user: ElicitationFnT) -> AsyncIterator[ClientSession]:
    """The SDK's client in a new session, which ends with the block.

    Args:
        http: The client that the SDK uses.
        user: Answers the questions of the server.
    """
    async with (
        streamable_http_client("http://proxy/mcp", http_client=http) as (incoming, outgoing, _),
        ClientSession(incoming, outgoing, elicitation_callback=user) as client,
    ):
        await client.initialize()
        yield client
