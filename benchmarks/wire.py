"""Round trips, commands and bytes of one operation, counted on the wire and by the server."""

import statistics
from collections.abc import Sequence

from .measure import Operation
from .relay import RelayProcess
from .results import Row
from .servers import Snapshot, Target

_TIMES = 20
# Long enough for a whole request to arrive before its reply can leave.
_ROUND_TRIP = 0.004


async def count(
    operation: Operation, ids: Sequence[str], relay: RelayProcess, target: Target
) -> Row:
    """What one operation costs on the wire, from one caller on connections that are up.

    Raises:
        RuntimeError: The operations differ from each other, so there is no cost of one.
    """
    for id in ids[:_TIMES]:
        await operation(id)  # connects, and fills whatever caches
    relay.delay(_ROUND_TRIP)
    with target.client() as client:
        before = Snapshot.of(client)
        relay.count()
        for id in ids[:_TIMES]:
            await operation(id)
        counts = relay.counts()
        executed = Snapshot.of(client).since(before).calls
    relay.delay(0)
    for number in (counts.turns, counts.replies, *counts.commands.values(), *executed.values()):
        if number % _TIMES:
            message = (
                "the cost varies from one time to the next, or others use the server meanwhile: "
                f"{counts}, {executed}"
            )
            raise RuntimeError(message)
    return {
        "round_trips": counts.turns // _TIMES,
        "commands": {name: number // _TIMES for name, number in counts.commands.items()},
        "executed": {name: number // _TIMES for name, number in executed.items()},
        "bytes_sent": round(counts.bytes_sent / _TIMES),
        "bytes_received": round(counts.bytes_received / _TIMES),
    }


def slope(round_trips: Sequence[float], latencies: Sequence[float]) -> float:
    """How many round trips a latency consists of: the slope of latency over round-trip time."""
    return statistics.linear_regression(round_trips, latencies).slope
