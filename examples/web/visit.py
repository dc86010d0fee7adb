"""One visit to the shop with two devices, which checks each step."""

import asyncio
import re
from contextlib import AsyncExitStack

import httpx


async def visit(url: str) -> int:
    """Visit the shop, print each step, and return the number of steps that went wrong."""
    wrong, replicas = 0, set[str]()

    def check(step: str, *, ok: bool) -> None:
        nonlocal wrong
        wrong += not ok
        print(f"  {'ok   ' if ok else 'WRONG'}  {step}", flush=True)

    async with AsyncExitStack() as stack:
        laptop, phone = [
            await stack.enter_async_context(
                httpx.AsyncClient(base_url=url, follow_redirects=True, timeout=30)
            )
            for _ in range(2)
        ]
        print("\nA visit with two devices:")
        await laptop.get("/")
        check("reading the shop creates no session", ok=not laptop.cookies)

        await laptop.post("/cart/tea")
        first = laptop.cookies.get("session")
        check("the first item creates one", ok=bool(first))

        page = await laptop.post("/sign-in", data={"name": "Ada"})
        check("signing in gives it a new id", ok=laptop.cookies.get("session") != first)
        check("the cart is kept", ok="1 item<" in page.text)

        await asyncio.gather(*(laptop.post("/cart/rice") for _ in range(8)))
        for _ in range(2):
            page = await laptop.get("/")
            replicas.update(re.findall(r'id="replica">(\w)<', page.text))
        check("8 items added at once all arrive", ok="9 items<" in page.text)
        check("both replicas answer", ok=replicas == {"A", "B"})

        await phone.post("/sign-in", data={"name": "Ada"})
        page = await laptop.get("/devices")
        check("both devices are listed", ok=page.text.count('class="device"') == 2)

        page = await laptop.post("/devices/sign-out-others")
        check("signing out everywhere else leaves one", ok=page.text.count('class="device"') == 1)
        page = await phone.get("/devices")
        check("the other one is signed out", ok=page.url.path == "/sign-in")
    return min(wrong, 1)
