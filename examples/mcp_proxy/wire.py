"""What the demo's client is plugged into: every request goes to the next replica, and is metered.

The SDK's client believes that it talks to one server. Underneath it sits an httpx transport that
hands its requests to the replicas in turn, as a load balancer would, and notes what came of each.

How the cost of a request is counted: `INFO commandstats`, the store's own count of the commands it
has run, is read before a request goes out and again when its response's headers have come, and
subtracted; by then the proxy has done all that it does in the store. Requests go one at a time up
to that point, so none is charged for another. Left out are the demo's own commands (`INFO` and
`DBSIZE`) and the words with which a new connection introduces itself (`HELLO`, `CLIENT SETINFO` and
the like): a replica says them once for each connection, not for each request. The store also counts
what a Lua script runs inside it. The proxies themselves send `GETEX` and scripts, so whatever is
counted beside a script was run by it, costs no round trip, and is shown apart.
"""

import asyncio
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import httpx
from redis.asyncio import Redis

SCRIPTS = frozenset({"evalsha", "eval"})
_INTRODUCTION = frozenset({"hello", "auth", "select"})
_OUR_OWN = frozenset({"info", "dbsize"})


@dataclass(frozen=True)
class Cost:
    """What one request made the store do: how often it ran each command."""

    calls: Counter[str]

    @property
    def sent(self) -> list[str]:
        """The commands that came over the wire: each is one round trip."""
        names = sorted(self.calls.elements(), key=lambda name: (name in SCRIPTS, name == "eval"))
        return [name for name in names if not self._scripted(name)]

    def __str__(self) -> str:
        sent = self.sent
        text = f"{len(sent)} command{'s' * (len(sent) != 1)}"
        if sent:
            text += f": {', '.join(sent).upper()}"
        scripted = [name for name in sorted(self.calls) if self._scripted(name)]
        return f"{text} (a script, running {', '.join(scripted).upper()})" if scripted else text

    def _scripted(self, name: str) -> bool:
        return not SCRIPTS.isdisjoint(self.calls) and name not in {"getex", *SCRIPTS}


class Meter:
    """Reads the store's count of the commands it has run, over a connection of its own."""

    def __init__(self, store: Redis) -> None:
        self._store = store

    async def read(self) -> Counter[str]:
        """How often each command has run so far."""
        stats = await self._store.info("commandstats")
        calls = {name.removeprefix("cmdstat_"): each["calls"] for name, each in stats.items()}
        ignored = _OUR_OWN | _INTRODUCTION | {name for name in calls if name.startswith("client|")}
        return Counter({name: calls[name] for name in calls.keys() - ignored})


@dataclass(frozen=True)
class Replica:
    """A proxy that requests can go to."""

    name: str
    url: str


@dataclass(frozen=True)
class Exchange:
    """A request, where it went, and what came of it."""

    request: httpx.Request
    replica: Replica
    response: httpx.Response
    cost: Cost | None  # None: the store was down, and could not be asked

    @property
    def label(self) -> str:
        """What the request is, in the words of MCP."""
        if self.request.method != "POST":
            return "event stream" if self.request.method == "GET" else "session"
        match json.loads(self.request.content):
            case {"method": "tools/call", "params": {"name": tool}}:
                return f"tools/call {tool}"
            case {"method": str(method)}:
                return method
            case _:
                return "answer to the server"

    @property
    def request_id(self) -> object:
        """The id of the JSON-RPC request, or None if it is none or has none."""
        message = json.loads(self.request.content or b"{}")
        return message.get("id") if "method" in message else None


class RoundRobin(httpx.AsyncBaseTransport):
    """Sends each request to the next of `replicas`, and reports it once the headers are back."""

    def __init__(
        self, replicas: list[Replica], meter: Meter, report: Callable[[Exchange], None]
    ) -> None:
        self.replicas = replicas
        self.meter: Meter | None = meter  # None once the store is down
        self._report = report
        self._turn = 0
        self._one_at_a_time = asyncio.Lock()
        self._network = httpx.AsyncHTTPTransport()

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """See `httpx.AsyncBaseTransport`."""
        async with self._one_at_a_time:
            replica = self.replicas[self._turn % len(self.replicas)]
            self._turn += 1
            meter = self.meter
            before = await meter.read() if meter else Counter[str]()
            response = await self._network.handle_async_request(
                httpx.Request(
                    request.method,
                    replica.url,
                    headers=request.headers,
                    stream=request.stream,
                    extensions=request.extensions,
                )
            )
            cost = Cost(await meter.read() - before) if meter else None
            if response.is_error:
                await response.aread()  # the report may look into it
            self._report(Exchange(request, replica, response, cost))
            return response

    async def aclose(self) -> None:
        """See `httpx.AsyncBaseTransport`."""
        await self._network.aclose()
