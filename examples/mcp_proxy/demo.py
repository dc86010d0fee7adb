"""A client keeps its MCP session when the replica of the proxy that opened it is killed.

The demo needs no other server, and runs on free loopback ports. It exits with 1 if anything
differs from its expectation. With --serve it only starts the programs, for a client of your own.
"""

import argparse
import asyncio
import logging
import signal
import sys
import time
import traceback
from collections.abc import Sequence

import httpx
from client import Balancer, Exchange, connected
from mcp import ClientSession, types
from processes import Service, System, is_free, started
from redis.asyncio import Redis
from report import BOLD, GREEN, RED, Report, coloured

from aiosessions import RedisStorage

PICTURE = """
    MCP client --+-- proxy A --+-- MCP server, which keeps a running
                 |      |      |   total for each session
                 +-- proxy B --+
                        |
                     Valkey, with the sessions that A and B share"""
ACCEPT = {"Accept": "application/json, text/event-stream"}
HELLO = types.InitializeRequest(
    params=types.InitializeRequestParams(
        protocolVersion="2025-11-25",
        capabilities=types.ClientCapabilities(),
        clientInfo=types.Implementation(name="demo", version="1"),
    )
).model_dump(mode="json", exclude_none=True) | {"jsonrpc": "2.0", "id": 0}
# The deletion tells all replicas, and the one with the stream looks whether the session is gone.
PUBLISHED = {"publish": 1, "getex": 1}


class Demo:
    """The steps of the demo."""

    def __init__(self, report: Report, system: System, store: Redis) -> None:
        self.report = report
        self.system = system
        self.store = store
        self.balancer = Balancer(store, system.a)
        self.http = httpx.AsyncClient(transport=self.balancer, timeout=60)

    async def run(self) -> None:
        """Run all steps but the first."""
        a, b = self.system.a, self.system.b
        self.report.heading("2. Open a session through A")
        async with connected(self.http, self.decline) as client:
            await self.opened(client)
            self.report.heading("3. Add numbers, through A and B in turn")
            await self.add(client, 1, a, 1)
            # The session is new to B, which keeps a copy from now on. A has one since step 2.
            await self.add(client, 2, b, 3, commands=["getex"])
            await self.add(client, 3, a, 6)
            await self.add(client, 4, b, 10)
            await self.ask(client)
            self.report.heading("4. Open a session through A, and delete it behind A's back")
            await self.revoke(a)
            self.report.heading("5. Kill A with SIGKILL, and go on through B")
            self.balancer.proxy = b
            a.process.kill()
            status = await a.process.wait()
            self.report.event(f"A ended by signal {-status}", status=(status, -signal.SIGKILL))
            last = await self.add(client, 5, b, 15)
            stream = await self.balancer.next("GET")
            self.report.request("event stream", stream, "the client opened it again")
            self.report.heading("6. End the session: requests in it get 404")
        ended, held = await self.balancer.next("DELETE"), await self.store.dbsize()
        text = f"Valkey holds {held} sessions"
        self.report.request("end", ended, text, commands=None, held=(held, 0))
        await self.refused(last, 404, "Session not found", commands=None)
        self.report.heading(
            "7. Open another session and stop Valkey: 503, as the session may still exist"
        )
        async with connected(self.http, self.decline) as client:
            await self.opened(client)
            last = await self.add(client, 7, b, 7)
            self.balancer.store = None
            self.system.valkey.terminate()
            await self.refused(last, 503, "Session store unavailable", commands=None)

    async def opened(self, client: ClientSession) -> None:
        """Report a new session, when its event stream is open and its tools are listed."""
        await self.balancer.next("GET")
        await client.list_tools()
        exchange, held = await self.balancer.next("initialize"), await self.store.dbsize()
        text = f"Valkey holds {held} session"
        self.report.request("open", exchange, text, commands=None, held=(held, 1))

    async def add(
        self,
        client: ClientSession,
        number: int,
        proxy: Service,
        expected: int,
        commands: Sequence[str] = (),
    ) -> Exchange:
        """Add to the total of the session, through one of the replicas."""
        self.balancer.proxy = proxy
        total = result(await client.call_tool("add", {"number": number}))
        exchange = await self.balancer.next("tools/call")
        text, sums = coloured(f"total {total:>2}", BOLD), (total, expected)
        self.report.request(f"add {number}", exchange, text, commands=commands, total=sums)
        return exchange

    async def revoke(self, proxy: Service) -> None:
        """Delete a session in this process while a replica has an event stream of it open."""
        self.balancer.proxy = proxy
        opened = await self.http.post("http://proxy/mcp", headers=ACCEPT, json=HELLO)
        id = opened.headers["mcp-session-id"]
        headers = ACCEPT | {"Mcp-Session-Id": id}
        async with self.http.stream("GET", "http://proxy/mcp", headers=headers) as stream:
            self.report.request("event stream", await self.balancer.next("GET"), "")
            before, start = await self.balancer.count(), time.monotonic()
            await RedisStorage(self.store, ttl=1).delete(id)
            await stream.aread()
            milliseconds = 1000 * (time.monotonic() - start)
        used = await self.balancer.count() - before
        self.report.event(
            f"deleted       the stream through {proxy.name} has ended after {milliseconds:.1f} ms",
            commands=({name: used[name] for name in ("publish", "getex")}, PUBLISHED),
        )

    async def ask(self, client: ClientSession) -> None:
        """Call a tool that asks the user: the question passes through A, the answer through B."""
        self.balancer.proxy = self.system.a
        total = result(await client.call_tool("clear", {}))
        call, answer = await self.balancer.next("tools/call"), await self.balancer.next("answer")
        self.report.request("clear", call, 'asks: "Clear the total of 10?"')
        text = coloured(f"total {total:>2}", BOLD)
        way = answer.proxy.name, "B"
        self.report.request("answer: no", answer, text, status=202, total=(total, 10), way=way)

    async def decline(
        self,
        context: object,  # noqa: ARG002 - the protocol of the SDK names it
        params: types.ElicitRequestParams,  # noqa: ARG002
    ) -> types.ElicitResult:
        """Answer a question as the user, through B."""
        self.balancer.proxy = self.system.b
        return types.ElicitResult(action="accept", content={"sure": False})

    async def refused(
        self,
        exchange: Exchange,
        status: int,
        message: str,
        commands: Sequence[str] | None,
    ) -> None:
        """Send a request again, which the proxy now refuses."""
        request = exchange.request
        await self.http.post(request.url, headers=request.headers, content=request.content)
        again = await self.balancer.next("tools/call")
        error = again.response.json()["error"]["message"]
        self.report.request(
            "add", again, error, status=status, commands=commands, error=(error, message)
        )


def result(answer: types.CallToolResult) -> object:
    """The value that a tool returned."""
    return (answer.structuredContent or {}).get("result")


async def show(port: int) -> int:
    """Run the demo; return the exit status."""
    # The SDK's client logs a failure to end its session, which is the last step of the demo.
    logging.getLogger("mcp.client.streamable_http").setLevel(logging.CRITICAL)
    report, start = Report(), time.monotonic()
    print(coloured("The claim: a session survives the proxy that opened it.", BOLD))
    print(PICTURE)
    report.heading("1. Start the programs, on loopback ports")
    async with asyncio.timeout(60), started(port) as system:
        describe(system)
        async with Redis.from_url(system.valkey.connection_url) as store:
            # Before the subscription, a replica keeps no copy for long.
            while dict(await store.pubsub_numsub("session:changes"))[b"session:changes"] < 2:  # noqa: ASYNC110 - in other processes
                await asyncio.sleep(0.01)
            demo = Demo(report, system, store)
            async with demo.http:
                await demo.run()
    seconds = time.monotonic() - start
    if report.failed:
        print(coloured(f"\nFAILED: {report.failed} of {report.checks} checks", RED))
        return 1
    print(
        "\nThe total went on from 10 to 15 although the proxy that had opened the session\n"
        "was dead: the other one found it in Valkey. The first request through a replica\n"
        "costs one GETEX, the others nothing for 60 s. A write or a deletion adds one\n"
        "PUBLISH, so that no replica goes on with an old copy."
    )
    print(coloured(f"All {report.checks} checks passed in {seconds:.1f} s.", GREEN))
    return 0


async def serve(port: int) -> int:
    """Run the programs until SIGINT or SIGTERM."""
    async with started(port) as system:
        describe(system)
        print(
            "\nGive an MCP client either proxy's URL. Kill one proxy with `kill -9`, change the\n"
            "client's URL to the other one, and its session goes on. Ctrl-C stops everything."
        )
        sys.stdout.flush()
        await asyncio.Event().wait()
    return 0


def describe(system: System) -> None:
    """Print the URLs of the programs."""
    print(f"  {'Valkey':<10}  {system.valkey.connection_url}")
    for name, service in [
        ("MCP server", system.backend),
        ("proxy A", system.a),
        ("proxy B", system.b),
    ]:
        print(f"  {name:<10}  {service.url}  process {service.process.pid}", flush=True)


async def main() -> int:
    """Run the demo, or serve; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--serve", action="store_true", help="start the programs, and wait")
    parser.add_argument("--port", type=int, default=0, help="A listens on PORT, B on PORT + 1")
    options = parser.parse_args()
    if options.port:
        for port in options.port, options.port + 1:
            if not is_free(port):
                parser.error(f"port {port} is in use or not allowed")
    if task := asyncio.current_task():
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    try:
        return await (serve if options.serve else show)(options.port)
    except asyncio.CancelledError:
        print("\nStopped, and every program with it.")
        return 0 if options.serve else 1
    except Exception:  # noqa: BLE001 - any error fails the demo
        traceback.print_exc()
        print(coloured("\nFAILED: the demo ended early", RED))
        return 1


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
