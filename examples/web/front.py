"""A reverse proxy that gives each request to the next replica.

It keeps no cookies and reads none: any replica can answer any request.
"""

import itertools
import os

import httpx
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.types import Receive, Scope, Send

REPLICAS = os.environ["REPLICAS"].split()
# A page that follows a POST is the second request of a click. So they take turns by themselves.
pages, changes = itertools.cycle(REPLICAS), itertools.cycle(REPLICAS)
# A transport, because a client would keep the cookies of all visitors. Without idle connections, a
# request to a replica that was killed fails before it is sent.
transport = httpx.AsyncHTTPTransport(limits=httpx.Limits(max_keepalive_connections=0))


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    """Forward a request."""
    response = await forward(Request(scope, receive))
    await response(scope, receive, send)


async def forward(request: Request) -> Response:
    """Return the answer of the next replica that is up."""
    turns = pages if request.method == "GET" else changes
    target, body = request.scope["raw_path"], await request.body()
    if query := request.scope["query_string"]:
        target += b"?" + query
    for _ in REPLICAS:
        url = httpx.URL(next(turns)).copy_with(raw_path=target)
        outgoing = httpx.Request(request.method, url, headers=request.headers.raw, content=body)
        try:
            answer = await transport.handle_async_request(outgoing)
        except httpx.ConnectError:
            continue
        response = Response(await answer.aread(), answer.status_code)
        response.raw_headers = [(name.lower(), value) for name, value in answer.headers.raw]
        return response
    return PlainTextResponse("Both replicas are down.", 502)
