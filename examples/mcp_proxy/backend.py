"""A real MCP server, made with the official SDK: stateful sessions over streamable HTTP.

Its state lives in this process alone. A request that belongs to a session but names none, or the
wrong one, gets nowhere: that is why the proxy in front must know each client's session here.
"""

import asyncio
import logging
from contextlib import suppress
from weakref import WeakKeyDictionary

from mcp.server.fastmcp import Context, FastMCP
from mcp.server.session import ServerSession
from pydantic import BaseModel
from serve import serve

server = FastMCP("backend", log_level="WARNING")
totals: WeakKeyDictionary[ServerSession, int] = WeakKeyDictionary()


class Confirmation(BaseModel):
    """What the client's user is asked for before a total is cleared."""

    sure: bool


@server.tool()
def add(number: int, context: Context[ServerSession, None]) -> int:
    """Add to this session's running total, and say what it is now."""
    totals[context.session] = totals.get(context.session, 0) + number
    return totals[context.session]


@server.tool()
async def clear(context: Context[ServerSession, None]) -> str:
    """Set this session's total to zero, once the user has confirmed it.

    The question travels on the response stream of this very call, and the answer comes in as
    another request, so a proxy that holds a stream back until it is complete would wait for ever.
    """
    reply = await context.elicit("Clear the total?", schema=Confirmation)
    if reply.action != "accept" or not reply.data.sure:
        return "kept"
    totals[context.session] = 0
    return "cleared"


if __name__ == "__main__":
    # SDK 1.30 logs an error with a traceback when a client ends its session while a stream is open.
    logging.getLogger("mcp.server.streamable_http").setLevel(logging.CRITICAL)
    with suppress(KeyboardInterrupt):  # Ctrl-C
        asyncio.run(serve(server.streamable_http_app()))
