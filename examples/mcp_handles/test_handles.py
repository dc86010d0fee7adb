"""The carts of the example: two replicas, one Valkey, and the client of the SDK, over HTTP."""

import asyncio
import re
import secrets
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import pytest_asyncio
from mcp.server.mcpserver.exceptions import ToolError

from examples.mcp_handles import demo
from examples.mcp_handles.demo import call, connected, replica
from examples.mcp_handles.server import caller
from tests.support.servers import Server, binaries, running

ALICE, BOB = secrets.token_urlsafe(), secrets.token_urlsafe()
USERS = {ALICE: "alice", BOB: "bob"}
GONE = "This cart has expired or is not yours. Use open_cart again."
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def store() -> Iterator[Server]:
    """The Valkey of both replicas."""
    with running(binaries()["valkey"]) as server:
        yield server


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def replicas(store: Server) -> AsyncIterator[tuple[str, str]]:
    """The URLs of two replicas."""
    async with replica(store.url, USERS) as a, replica(store.url, USERS) as b:
        yield a, b


@pytest.mark.parametrize("revision", ["2026-07-28", "legacy"])
async def test_replicas_share_a_cart(replicas: tuple[str, str], revision: str) -> None:
    """A client of either revision finds its cart on both replicas, and no addition is lost."""
    served: list[int | None] = []

    async def take_turns(request: httpx2.Request) -> None:
        request.url = httpx2.URL(replicas[len(served) % 2])
        served.append(request.url.port)

    hooks = {"request": [take_turns]}
    async with connected(replicas[0], ALICE, revision, event_hooks=hooks) as client:
        handle = str(await call(client, "open_cart"))
        items = [f"item {number}" for number in range(8)]
        await asyncio.gather(*(call(client, "add", handle=handle, item=item) for item in items))
        for _ in replicas:
            found: Any = await call(client, "read", handle=handle)
            assert sorted(found) == items
    assert len(set(served)) == 2


@pytest.mark.parametrize("tool", ["add", "read", "close"])
async def test_cart_of_another_user_is_not_found(replicas: tuple[str, str], tool: str) -> None:
    """The error is the one for an unknown handle, and the cart stays as it is."""
    arguments = {"item": "theirs"} if tool == "add" else {}
    async with connected(replicas[0], ALICE) as alice, connected(replicas[1], BOB) as bob:
        handle = str(await call(alice, "open_cart"))
        await call(alice, "add", handle=handle, item="tea")
        refusal = await call(bob, tool, handle=handle, **arguments)
        assert refusal == await call(bob, tool, handle="unknown", **arguments)
        assert str(refusal).endswith(GONE)
        assert await call(alice, "read", handle=handle) == ["tea"]


async def test_handle_without_cart_names_the_remedy(
    replicas: tuple[str, str], store: Server
) -> None:
    """The handle is expired, closed or malformed, and the error tells the model what to do."""
    async with connected(replicas[0], ALICE) as a, connected(replicas[1], ALICE) as b:
        expired = str(await call(a, "open_cart"))
        store.age(1795)
        await call(b, "read", handle=expired)  # starts the 30 minutes again
        store.age(1795)
        assert await call(b, "read", handle=expired) == []
        store.age(1800)
        closed = str(await call(a, "open_cart"))
        await call(b, "close", handle=closed)
        for handle in (expired, closed, "two words", ""):
            assert str(await call(a, "add", handle=handle, item="tea")).endswith(GONE)


async def test_tools_state_the_lifetime(replicas: tuple[str, str]) -> None:
    """The description of `open_cart` says when a cart expires, which a model reads first."""
    async with connected(replicas[0], ALICE) as client:
        tools = {tool.name: tool.description for tool in (await client.list_tools()).tools}
    assert tools.keys() == {"open_cart", "add", "read", "close"}
    assert "expires after 30 minutes" in str(tools["open_cart"])


def test_call_without_user_is_refused() -> None:
    """Otherwise all callers without a subject would share their carts."""
    with pytest.raises(ToolError, match="Sign in"):
        caller()


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer unknown"}])
async def test_caller_without_valid_token_is_refused(
    replicas: tuple[str, str], headers: dict[str, str]
) -> None:
    """The status is 401, before any tool runs."""
    async with httpx2.AsyncClient(headers=headers) as http:
        assert (await http.post(replicas[0], json={})).status_code == 401


async def test_store_and_logs_hold_no_handle(
    store: Server, capfd: pytest.CaptureFixture[str]
) -> None:
    """Keys, records and the output of a replica hold neither a handle nor a token."""
    async with replica(store.url, USERS) as url, connected(url, ALICE) as client:
        handle = str(await call(client, "open_cart"))
        await call(client, "add", handle=handle, item="tea")
        await call(client, "read", handle=f"{handle}x")
        with store.client() as redis:
            keys: Any = redis.keys("*")
            stored = b"".join(key + redis.dump(key) for key in keys).decode("latin-1")
    output = "".join(capfd.readouterr())
    assert '["tea"]' in stored
    for secret in (handle, ALICE):
        assert secret not in stored
        assert secret not in output


async def test_demo_shows_both_replicas(capsys: pytest.CaptureFixture[str]) -> None:
    """Alice adds through both replicas; Bob, and Alice after the end of the cart, get errors."""
    await demo.main()
    lines = capsys.readouterr().out.splitlines()
    assert [re.split(r":\s+(?:Error .*: )?", line)[1] for line in lines] == [
        "['tea']",
        "['tea', 'milk']",
        GONE,
        GONE,
    ]


def test_recipe_quotes_the_server() -> None:
    """Each line of the recipe's code is a line of the server, in its order."""
    page = (ROOT / "docs" / "recipes.md").read_text("utf-8")
    (quoted,) = re.findall(r"```py\n(.*?)```", page.partition("(MCP)\n")[2], re.DOTALL)
    rest = iter(Path(__file__).with_name("server.py").read_text("utf-8").splitlines())
    for line in filter(None, quoted.splitlines()):
        assert line in rest  # consumes the lines up to it
