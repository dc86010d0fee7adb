"""The scenarios, by the name of their subcommand."""

from collections.abc import Callable

from ..measure import Bench
from ..results import Result
from . import arrivals, cas, load, local, memory, peers, rtt, server, shared, tls

SCENARIOS: dict[str, Callable[[Bench], Result]] = {
    "load": load.run,
    "rtt": rtt.run,
    "server": server.run,
    "peers": peers.run,
    "local": local.run,
    "codecs": local.run_codecs,
    "cas": cas.run,
    "shared": shared.run,
    "arrivals": arrivals.run,
    "tls": tls.run,
    "memory": memory.run,
}
