"""A shop with sessions: a cart, a sign-in, and a list of the user's devices.

One replica: `REDIS_URL=redis://localhost:6379 uvicorn app:app`. `run.py` starts two.
"""

import os
import secrets
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated

import pages
from fastapi import Depends, FastAPI, Form, HTTPException, Request
from fastapi.responses import HTMLResponse, RedirectResponse

from aiosessions import RedisStorage, SessionManager, session_digest
from aiosessions.asgi import CookieTransport, SessionMiddleware, get_session

storage = RedisStorage.from_url(os.environ["REDIS_URL"], ttl=1800)
sessions = SessionManager(storage, max_lifetime=86_400)


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    """Open the storage once per process."""
    async with storage, sessions:
        yield


app = FastAPI(lifespan=lifespan)
app.add_middleware(
    SessionMiddleware,
    sessions=sessions,
    # Only because the example is served over HTTP, on loopback. Leave this out behind HTTPS.
    transport=CookieTransport(secure=False),
)


def visit_of(request: Request) -> pages.Visit:
    """Return the facts that each page shows."""
    session = get_session(request)
    digest = None if session.is_new else session_digest(session.id)
    return pages.Visit(session.principal, digest, os.environ.get("REPLICA", "A"))


def signed_in(request: Request) -> str:
    """Return the user's name, or redirect to the sign-in page."""
    principal = get_session(request).principal
    if principal is None:
        raise HTTPException(303, headers={"Location": "/sign-in"})
    return principal


User = Annotated[str, Depends(signed_in)]


@app.get("/")
async def shop(request: Request) -> HTMLResponse:
    """Show the products and the cart."""
    return pages.shop(visit_of(request), Counter(request.session.values()))


@app.post("/cart/{product}")
async def add(request: Request, product: str) -> RedirectResponse:
    """Put a product into the cart."""
    if product not in pages.PRODUCTS:
        raise HTTPException(404)
    # Each item has a key of its own, so two tabs can add items at the same time.
    request.session[secrets.token_urlsafe(6)] = product
    return RedirectResponse("/", 303)


@app.post("/cart/{product}/remove")
async def remove(request: Request, product: str) -> RedirectResponse:
    """Take one piece of a product out of the cart."""
    for key, item in list(request.session.items()):
        if item == product:
            del request.session[key]
            break
    return RedirectResponse("/", 303)


@app.get("/sign-in")
async def show_sign_in(request: Request) -> HTMLResponse:
    """Show the form."""
    return pages.sign_in(visit_of(request))


@app.post("/sign-in")
async def sign_in(
    request: Request, name: Annotated[str, Form(min_length=1, max_length=40)]
) -> RedirectResponse:
    """Sign in under any name. A real shop checks a password here."""
    session = get_session(request)
    session.principal = name.strip() or "nobody"  # the middleware gives the session a new id
    session.metadata["user-agent"] = request.headers.get("user-agent", "")[:200]
    return RedirectResponse("/", 303)


@app.post("/sign-out")
async def sign_out(request: Request) -> RedirectResponse:
    """Delete this session."""
    await get_session(request).delete()
    return RedirectResponse("/", 303)


@app.get("/devices")
async def devices(request: Request, user: User) -> HTMLResponse:
    """List the user's sessions."""
    return pages.devices(visit_of(request), await sessions.list(user))


@app.post("/devices/sign-out-others")
async def sign_out_others(request: Request, _: User) -> RedirectResponse:
    """Delete all sessions of the user except this one."""
    await get_session(request).revoke_all(keep=True)
    return RedirectResponse("/devices", 303)


@app.post("/devices/{digest}/sign-out")
async def sign_out_device(digest: str, user: User) -> RedirectResponse:
    """Delete one session of the user."""
    await sessions.revoke(user, digest)
    return RedirectResponse("/devices", 303)
