"""Serve an ASGI application on a loopback port, and print its URL."""

import socket

import uvicorn
from starlette.types import ASGIApp


async def serve(app: ASGIApp, port: int = 0) -> None:
    """Print the URL of the MCP endpoint as the only line on stdout, then serve until stopped.

    The socket listens before the line is printed, so a reader of the line can connect at once.
    """
    with socket.create_server(("127.0.0.1", port)) as listener:
        # asyncio sets this on its own sockets only. Without it small answers wait 40 ms for an ACK.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # The kernel notices clients that vanish without a word, so their streams end.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        print(f"http://127.0.0.1:{listener.getsockname()[1]}/mcp", flush=True)
        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1)
        await uvicorn.Server(config).serve(sockets=[listener])
