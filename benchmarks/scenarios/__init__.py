"""The scenarios, by the name of their subcommand."""

from collections.abc import Callable

from ..measure import Bench
from ..results import Result
from .arrivals import arrivals, tls
from .closed import cas, load, peers, shared
from .local import codecs, local
from .memory import memory
from .near import near
from .principals import principals
from .rtt import rtt
from .server import server
from .web import web

SCENARIOS: dict[str, Callable[[Bench], Result]] = {
    each.__name__: each
    for each in (
        *(load, rtt, server, peers, local, codecs),
        *(cas, principals, near, shared, arrivals, tls, web, memory),
    )
}
