"""An MCP server with a running total for each session, made with the official SDK.

The totals are in the memory of this process. The server finds a total by the session id that it
gave out, so the proxy must know that id for each client.
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
    """The user's answer to the question of `clear`."""

    sure: bool


@server.tool()
def add(number: int, context: Context[ServerSession, None]) -> int:
    """Add to this session's total, and return it."""
    totals[context.session] = totals.get(context.session, 0) + number
    return totals[context.session]


@server.tool()
async def clear(context: Context[ServerSession, None]) -> int:
    """Set this session's total to zero if the user confirms it, and return the total.

    The question leaves on the response stream of this call, and the answer arrives as another
    request. A proxy that buffers responses would block both.
    """
    total = totals.get(context.session, 0)
    reply = await context.elicit(f"Clear the total of {total}?", schema=Confirmation)
    if reply.action == "accept" and reply.data.sure:
        totals[context.session] = 0
    return totals.get(context.session, 0)


if __name__ == "__main__":
    # SDK 1.30 logs an error with a traceback when a client ends its session while a stream is open.
    logging.getLogger("mcp.server.streamable_http").setLevel(logging.CRITICAL)
    with suppress(KeyboardInterrupt):
        asyncio.run(serve(server.streamable_http_app()))
