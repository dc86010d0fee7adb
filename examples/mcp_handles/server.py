"""An MCP server that keeps shopping carts, for the revision 2026-07-28 and any number of replicas.

A tool returns a handle, and the model passes it to the other tools. The handle is a session's id.

- Every call checks the handle and the caller together. A cart of another user is "not found".
- The process keeps no state between two calls, so each call may reach another replica.
- Handles and tokens are not logged, and the store holds only digests of the handles.
"""

import asyncio
import json
import os
import socket
from collections.abc import Awaitable
from typing import Any

import uvicorn
from mcp.server.auth.middleware.auth_context import get_access_token
from mcp.server.auth.provider import AccessToken, TokenVerifier
from mcp.server.auth.settings import AuthSettings
from mcp.server.mcpserver import MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from pydantic import AnyHttpUrl

from aiosessions import (
    InvalidSessionId,
    JsonCodec,
    RedisStorage,
    Session,
    SessionManager,
    SessionNotFound,
)

# The public URL of all replicas, and the server that issues tokens for it.
URL, ISSUER = AnyHttpUrl("https://carts.example.com/mcp"), AnyHttpUrl("https://auth.example.com")

Cart = Session[list[str]]  # its items


def create_server(sessions: SessionManager[list[str]], tokens: TokenVerifier) -> MCPServer[Any]:
    """Create the server and its tools."""
    auth = AuthSettings(issuer_url=ISSUER, resource_server_url=URL, validate_token_resource=True)
    server = MCPServer[Any]("carts", token_verifier=tokens, auth=auth, log_level="WARNING")

    @server.tool()
    async def open_cart() -> str:
        """Open an empty cart and return its handle, which the other tools need.

        A cart expires after 30 minutes without a call, and a day after it was opened.
        """
        cart = await sessions.create(kind="cart", principal=caller(), data=[])
        return cart.id

    @server.tool()
    async def add(handle: str, item: str) -> list[str]:
        """Add an item to a cart, and return all items."""
        change = sessions.mutate(handle, lambda cart: cart.data.append(item), principal=caller())
        return (await found(change)).data

    @server.tool()
    async def read(handle: str) -> list[str]:
        """Return the items of a cart."""
        cart = await found(sessions.get(handle, principal=caller()))
        return cart.data

    @server.tool()
    async def close(handle: str) -> None:
        """Delete a cart."""
        await found(sessions.get(handle, principal=caller()))
        await sessions.delete(handle)

    return server


async def found(cart: Awaitable[Cart]) -> Cart:
    """Wait for a cart; if there is none, tell the model what to do."""
    try:
        return await cart
    except (SessionNotFound, InvalidSessionId):
        raise ToolError("This cart has expired or is not yours. Use open_cart again.") from None


def caller() -> str:
    """Return the user whom the access token of this request names."""
    token = get_access_token()
    if token is None or not token.subject:
        raise ToolError("Sign in to use carts.")  # principal=None would be a cart without an owner
    return token.subject


class Tokens(TokenVerifier):
    """Knows the user of each token. A real verifier would check a signature, for example."""

    def __init__(self, users: dict[str, str]) -> None:
        self._users = users

    async def verify_token(self, token: str) -> AccessToken | None:
        """Return the claims of a valid token; the SDK calls this method for each request."""
        user = self._users.get(token)
        claims = AccessToken(token=token, client_id="", scopes=[], subject=user, resource=str(URL))
        return claims if user else None


async def main() -> None:
    """Serve on a loopback port, and print the URL."""
    users = json.loads(os.environ["CART_USERS"])  # {token: user}
    url = os.environ.get("REDIS_URL", "redis://localhost:6379")
    storage = RedisStorage.from_url(url, ttl=1800, key_prefix="cart:", codec=JsonCodec(list[str]))
    async with storage, SessionManager(storage, max_lifetime=86_400) as sessions:
        server = create_server(sessions, Tokens(users))
        # `stateless_http` lets clients of earlier revisions reach any replica, too.
        app = server.streamable_http_app(stateless_http=True, json_response=True)
        with socket.create_server(("127.0.0.1", int(os.environ.get("PORT", "0")))) as listener:
            print(f"http://127.0.0.1:{listener.getsockname()[1]}/mcp", flush=True)
            await uvicorn.Server(uvicorn.Config(app, log_level="warning")).serve([listener])


if __name__ == "__main__":
    asyncio.run(main())
