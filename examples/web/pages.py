"""The pages of the shop, as plain HTML."""

import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from fastapi.responses import HTMLResponse

from aiosessions import SessionInfo

# A link to it would be a second request, to the other replica.
STYLE = Path(__file__).with_name("style.css").read_text("utf-8")


@dataclass(frozen=True)
class Product:
    """A product, with its price in cents."""

    name: str
    note: str
    price: int


PRODUCTS = {
    "tea": Product("Darjeeling", "first flush, 100 g", 890),
    "bread": Product("Sourdough", "baked this morning", 540),
    "honey": Product("Heather honey", "from the next valley", 760),
    "lemons": Product("Lemons", "three, untreated", 210),
    "rice": Product("Black rice", "500 g", 430),
    "plums": Product("Plums", "one pound, ripe", 320),
}


@dataclass(frozen=True)
class Visit:
    """The facts that each page shows.

    Attributes:
        principal: The user's name, if signed in.
        digest: The digest of the session's id. None if nothing is stored for the visitor.
        replica: The name of the replica that answers.
    """

    principal: str | None
    digest: str | None
    replica: str


def shop(visit: Visit, cart: Counter[str]) -> HTMLResponse:
    """The products and the cart."""
    shelf = "".join(
        f"""<li><span class="tile {slug}">{product.name[0]}</span>
        <div><b>{product.name}</b><small>{product.note}</small></div>
        <span class="price">{money(product.price)}</span>
        {button(f"/cart/{slug}", "Add", label=f"Add {product.name}")}</li>"""
        for slug, product in PRODUCTS.items()
    )
    lines = "".join(
        f"""<li><span class="count">{cart[slug]} &times;</span> {product.name}
        <span class="price">{money(cart[slug] * product.price)}</span>
        {button(f"/cart/{slug}/remove", "&minus;", "plain", label=f"Remove {product.name}")}</li>"""
        for slug, product in PRODUCTS.items()
        if cart[slug]
    )
    total = sum(PRODUCTS[slug].price * count for slug, count in cart.items())
    count = f"{cart.total()} item{'' if cart.total() == 1 else 's'}"
    content = (
        f"""<ul class="lines">{lines}</ul><p class="total">Total <b>{money(total)}</b></p>
        <p class="hint">Open this page in two tabs, and add items in both.</p>"""
        if cart
        else '<p class="hint">Still empty. A visitor gets a session with the first item.</p>'
    )
    return page(
        visit,
        "Shop",
        f"""<div class="columns"><section><h1>Today in the shop</h1><ul class="shelf">{shelf}</ul>
        </section><aside class="card"><h2>Your cart <span class="pill">{count}</span></h2>
        {content}</aside></div>""",
    )


def sign_in(visit: Visit) -> HTMLResponse:
    """The form to sign in."""
    return page(
        visit,
        "Sign in",
        """<section class="card narrow"><h1>Sign in</h1>
        <p>Any name will do. Use the same name in a second browser to see two devices.</p>
        <form method="post" action="/sign-in"><label for="name">Name</label>
        <input id="name" name="name" required maxlength="40" autofocus autocomplete="username">
        <button>Sign in</button></form>
        <p class="hint">Your cart comes with you. The session gets a new id: compare the digest
        below before and after.</p></section>""",
    )


def devices(visit: Visit, infos: Iterable[SessionInfo[Any]]) -> HTMLResponse:
    """The user's sessions, with a button to end each."""
    rows, others = "", 0
    for info in infos:
        is_this, agent = info.digest == visit.digest, info.metadata.get("user-agent", "")
        others += not is_this
        action = (
            '<span class="pill">this device</span>'
            if is_this
            else button(f"/devices/{info.digest}/sign-out", "Sign out", "plain")
        )
        rows += f"""<li class="device" title="{escape(agent)}"><div><b>{device(agent)}</b>
            <small>since {info.created_at:%H:%M:%S} UTC, last change {info.updated_at:%H:%M:%S}
            · <code>{info.digest[:8]}</code></small></div>{action}</li>"""
    everywhere = (
        button("/devices/sign-out-others", "Sign out everywhere else", "danger")
        if others
        else '<p class="hint">Sign in with the same name in a second browser.</p>'
    )
    return page(
        visit,
        "Your devices",
        f"""<section class="card wide"><h1>Your devices</h1>
        <p>Each browser that is signed in as <b>{escape(visit.principal or "")}</b>.</p>
        <ul class="devices">{rows}</ul>{everywhere}</section>""",
    )


def page(visit: Visit, title: str, body: str) -> HTMLResponse:
    """A page with its head and foot."""
    user = (
        f"""<a href="/devices">Devices</a><span class="user">{escape(visit.principal)}</span>
        {button("/sign-out", "Sign out", "plain")}"""
        if visit.principal is not None
        else '<a class="button" href="/sign-in">Sign in</a>'
    )
    session = f"<code>{visit.digest}</code>" if visit.digest else "none: nothing is stored for you"
    return HTMLResponse(f"""<!doctype html><html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title} · Corner shop</title><link rel="icon" href="data:,"><style>{STYLE}</style></head>
<body><header><a class="brand" href="/">Corner shop</a>
<nav><a href="/">Shop</a>{user}</nav></header>
<main>{body}</main>
<footer><span class="replica replica-{visit.replica}">{visit.replica}</span>
<p>Replica <b id="replica">{visit.replica}</b> answered. Kill it, and the other one goes on:
<code>kill -9 {os.getpid()}</code><br>
Digest of the session's id: <span id="digest">{session}</span></p>
</footer></body></html>""")


def button(action: str, text: str, style: str = "", *, label: str = "") -> str:
    """A form with a button only. Links change nothing, because other sites can link here."""
    aria = f' aria-label="{label}"' if label else ""
    return f"""<form method="post" action="{action}"><button class="{style}"{aria}>{text}</button>
        </form>"""


def device(agent: str) -> str:
    """Name the browser and the system of a user agent."""
    browsers = {"Edg": "Edge", "Firefox": "Firefox", "Chrome": "Chrome", "Safari": "Safari"}
    systems = ("iPhone", "iPad", "Android", "Windows", "Macintosh", "Linux")
    browser = next((name for mark, name in browsers.items() if mark in agent), "A program")
    system = next((f" on {name}" for name in systems if name in agent), "")
    return browser + system


def money(cents: int) -> str:
    """A price in euros."""
    return f"€ {cents / 100:.2f}"
