"""The output of the demo: one line for each event, marked with the result of its checks."""

import os
import sys
from collections.abc import Sequence

from client import Exchange

GREEN, RED, BOLD = 32, 31, 1


def coloured(text: str, colour: int) -> str:
    """The text in a colour, if stdout is a terminal and NO_COLOR is not set."""
    if not sys.stdout.isatty() or os.environ.get("NO_COLOR"):
        return text
    return f"\x1b[{colour}m{text}\x1b[0m"


class Report:
    """Prints events, and counts checks.

    Attributes:
        checks: The number of values that were compared.
        failed: The number of values that were wrong.
    """

    def __init__(self) -> None:
        self.checks = 0
        self.failed = 0

    def heading(self, text: str) -> None:
        """Print the title of a step."""
        print(f"\n{coloured(text, BOLD)}", flush=True)

    def event(self, text: str, **checks: tuple[object, object]) -> None:
        """Print an event.

        Args:
            text: The event in words.
            checks: For each name, the actual value and the expected one.
        """
        wrong = {name: pair for name, pair in checks.items() if pair[0] != pair[1]}
        self.checks += len(checks)
        self.failed += len(wrong)
        mark = coloured("WRONG", RED) if wrong else coloured("ok", GREEN) + "   "
        print(f"  {mark}  {text}".rstrip(), flush=True)
        for name, (actual, expected) in wrong.items():
            print(coloured(f"         {name}: {actual!r} instead of {expected!r}", RED), flush=True)

    def request(
        self,
        what: str,
        exchange: Exchange,
        text: str,
        *,
        status: int = 200,
        commands: Sequence[str] | None = (),
        **checks: tuple[object, object],
    ) -> None:
        """Print a request; by default it succeeds without a command in Valkey.

        Args:
            what: The name of the request.
            exchange: The request with its outcome.
            text: The meaning of the outcome.
            status: The expected HTTP status.
            commands: The expected commands in Valkey; None if they are not counted.
            checks: See `event`.
        """
        actual, shown = exchange.response.status_code, ""
        checks["status"] = actual, status
        if commands is not None:
            checks["commands"] = exchange.commands, list(commands)
            shown = " ".join(exchange.commands).upper() or "-"
        self.event(
            f"{what:<12}  through {exchange.proxy.name}  {actual}  {shown:<5}  {text}", **checks
        )
