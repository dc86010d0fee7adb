"""Serve an ASGI application on a free loopback port, and say which one."""

import socket

import uvicorn
from starlette.types import ASGIApp


async def serve(app: ASGIApp) -> None:
    """Print the URL of the MCP endpoint as the only line on stdout, then serve until stopped.

    The port is bound before the line is printed, so whoever reads it can connect at once, and two
    processes cannot pick the same one.
    """
    with socket.create_server(("127.0.0.1", 0)) as listener:
        # asyncio does this for sockets it makes itself; else small answers wait 40 ms for an ACK.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        print(f"http://127.0.0.1:{listener.getsockname()[1]}/mcp", flush=True)
        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1)
        await uvicorn.Server(config).serve(sockets=[listener])
