"""The actions that the applications of this folder have in common.

Each module serves them with one framework. The variable AIOSESSIONS_TEST_URL has the address of the
store.
"""

import operator
import os
from collections.abc import Callable, MutableMapping
from typing import Any

from aiosessions import RedisStorage, SessionManager
from aiosessions.asgi import CookieTransport, WebSession

TRANSPORT = CookieTransport(secure=False)  # these tests use HTTP on loopback
Data = dict[str, Any]


def make_sessions() -> SessionManager[Any]:
    """The sessions of this process."""
    return SessionManager(RedisStorage.from_url(os.environ["AIOSESSIONS_TEST_URL"], ttl=600))


# The methods of a mapping, with the body of a request.
CHANGES: dict[str, Callable[[Any, Data], object]] = {
    "set": lambda data, body: [data.__setitem__(*item) for item in body.items()],
    "update": lambda data, body: data.update(body),
    "|=": operator.ior,
    "append": lambda data, body: data["list"].append(body),
    "pop": lambda data, body: data.pop(body["key"]),
    "setdefault": lambda data, body: data.setdefault(body["key"], "default"),
    "popitem": lambda data, _: data.popitem(),
    "clear": lambda data, _: data.clear(),
}


async def act(
    action: str,
    body: Data,
    data: MutableMapping[str, Any],
    web: WebSession[Any],
    sessions: SessionManager[Any],
    refuse: Callable[[], Exception],
) -> Data:
    """Do something with `request.session` or `get_session(request)`, and show both.

    Args:
        action: A method of a mapping, or another action.
        body: The body of the request.
        data: `request.session`.
        web: `get_session(request)`.
        sessions: The manager.
        refuse: Makes the exception of the framework for the status 403.
    """
    devices: list[str] = []
    if action in CHANGES:
        CHANGES[action](data, body)
    match action:
        case "sign-in":
            web.principal = body["name"]
            web.metadata["device"] = body["device"]
        case "fail":
            data["tried"], web.principal = True, "mallory"
            raise refuse()
        case "rotate":
            await web.rotate()
        case "devices":
            devices = [info.metadata["device"] for info in await sessions.list(web.principal or "")]
        case "sign-out-elsewhere":
            await web.revoke_all(keep=True)
        case "sign-out":
            await web.delete()
    return {
        "id": web.id,
        "principal": web.principal,
        "is_new": web.is_new,
        "data": dict(data),
        "devices": devices,
    }
