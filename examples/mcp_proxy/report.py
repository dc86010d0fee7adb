"""Tells a person what happens, and holds it against what should happen."""

import asyncio
from collections import defaultdict
from dataclasses import dataclass

from wire import Exchange


@dataclass(frozen=True)
class Refusal:
    """How the proxies are to answer."""

    status: int
    code: int
    message: str

    def body(self, request_id: object) -> dict[str, object]:
        """The JSON-RPC error: with the request's id, and without the key when it had none."""
        error = {"code": self.code, "message": self.message}
        identified = {} if request_id is None else {"id": request_id}
        return {"jsonrpc": "2.0", "error": error, **identified}


class Report:
    """Prints each step, request and fact as it comes, and keeps what differed.

    Attributes:
        exchanges: All requests so far.
        served: By their labels, those that were not refused: to wait for what the client sends
            in the background.
        refusal: How every request is to be refused from now on; None while they are to be served.
        differences: What was not as expected.
        checks: How many things have been compared.
    """

    def __init__(self) -> None:
        self.exchanges: list[Exchange] = []
        self.served: defaultdict[str, asyncio.Queue[Exchange]] = defaultdict(asyncio.Queue)
        self.refusal: Refusal | None = None
        self.differences: list[str] = []
        self.checks = 0

    def step(self, title: str) -> None:
        """Begin a chapter."""
        print(f"\n{title}", flush=True)

    def fact(self, what: str, actual: object, expected: object) -> None:
        """Print a fact, and whether it is as expected."""
        difference = self._compare(what, actual, expected)
        print(
            f"  DIFFERS  {difference}" if difference else f"      ok  {what}: {actual}", flush=True
        )

    def exchange(self, exchange: Exchange) -> None:
        """Print a request and its outcome; check its status, its cost and its error."""
        self.exchanges.append(exchange)
        if exchange.response.is_success:
            self.served[exchange.label].put_nowait(exchange)
        request, response, cost = exchange.request, exchange.response, exchange.cost
        print(
            f"  {request.method:>6} {exchange.label:<26} via {exchange.replica.name}"
            f"  {response.status_code}  {cost or 'the store is down'}",
            flush=True,
        )
        differences = [self._compare("status", response.status_code, self._status(exchange))]
        if cost is not None:
            # A script is sent in full the first time that a store sees it, after being refused.
            known = [name for name in cost.sent if not (name == "eval" and "evalsha" in cost.sent)]
            differences.append(self._compare("commands", known, self._commands(exchange)))
        if response.is_error and self.refusal:
            print(f"{'':>9}{response.text}", flush=True)
            expected = self.refusal.body(exchange.request_id)
            differences.append(self._compare("body", response.json(), expected))
        for difference in filter(None, differences):
            print(f"  DIFFERS  {difference}", flush=True)

    def _status(self, exchange: Exchange) -> int:
        if self.refusal:
            return self.refusal.status
        is_message = exchange.request.method == "POST"
        return 202 if is_message and exchange.request_id is None else 200

    def _commands(self, exchange: Exchange) -> list[str]:
        """What the request may cost: one GETEX, and a script when it opens or ends a session."""
        if exchange.label == "initialize":
            return ["evalsha"]
        ends = exchange.request.method == "DELETE" and not self.refusal
        return ["getex", "evalsha"] if ends else ["getex"]

    def _compare(self, what: str, actual: object, expected: object) -> str | None:
        self.checks += 1
        if actual == expected:
            return None
        difference = f"{what}: {actual!r}, not {expected!r}"
        self.differences.append(difference)
        return difference
