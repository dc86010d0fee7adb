"""The scenarios: the faults, and the errors and delays that each of them may cause."""

from contextlib import nullcontext
from functools import partial
from typing import Any

from .history import LATE
from .nemesis import (
    SHORT_TIMEOUT,
    WRONG_PASSWORD,
    clock_step,
    cluster_death,
    cluster_migration,
    demoted,
    disconnected,
    fail_over,
    half_open,
    hanging,
    killed,
    on_server,
    out_of_memory,
    partition,
    password,
    resets,
    stopped,
    unsubscribed,
)
from .run import Scenario

# Causes of errors, as beginnings of messages. The server closed the connection; the operating
# system reset it; or the fault proxy did either during the handshake.
_REFUSED = "cannot connect"
_LOST = (
    _REFUSED,
    "the server closed the connection",
    "the connection was lost",
    "a reply was lost",
)
_READ_ONLY = "the server is a read-only replica"

_DURABLE = ("--appendonly", "yes", "--appendfsync", "always")
_SLOW: Any = {"timeout": SHORT_TIMEOUT, "varies": SHORT_TIMEOUT}
# Less than the time for which clients ask for a session that was deleted.
_CACHED: Any = {"max_staleness": 0.1}

SCENARIOS = {
    "calm": Scenario("none", on_server(nullcontext, 0.0), in_doubt=False),
    "restart": Scenario(
        "restart after 0.3 s", on_server(stopped, 0.3, *_DURABLE), _LOST, bridged=True
    ),
    "kill": Scenario(
        "`SIGKILL`, restart after 0.5 s", on_server(killed, 0.5, *_DURABLE), _LOST, bridged=True
    ),
    "outage": Scenario(
        "`SIGKILL`, restart after 2 s",
        on_server(killed, 2.0, *_DURABLE),
        (*_LOST, "the server is still loading"),
        certain=_REFUSED,
    ),
    "hang": Scenario(
        "`SIGSTOP` and `SIGCONT`", on_server(hanging, 1.5, **_SLOW), _LOST, certain=LATE
    ),
    "hang-staggered": Scenario(
        "`SIGSTOP` and `SIGCONT`, staggered calls",
        on_server(hanging, 1.5, retry_after=(0.0, SHORT_TIMEOUT), **_SLOW),
        _LOST,
        certain=LATE,
    ),
    "reset": Scenario("connections reset or closed", resets, _LOST),
    "half-open": Scenario("half-open connections", half_open, ("a reply was lost",), certain=LATE),
    "client-kill": Scenario("`CLIENT KILL`", on_server(disconnected, 0.1, often=5), _LOST),
    "out-of-memory": Scenario(
        "out of memory (`maxmemory`, noeviction)",
        on_server(out_of_memory, 1.0),
        certain="the server is out of memory",
        in_doubt=False,
    ),
    "read-only": Scenario(
        "read-only replica for 2 s", on_server(demoted, 2.0), certain=_READ_ONLY, in_doubt=False
    ),
    "sentinel": Scenario(
        "Sentinel failover, the master having lost its replica",
        fail_over(),
        (*_LOST, LATE, _READ_ONLY),
        certain=_REFUSED,
        promotes=True,
    ),
    "sentinel-min-replicas": Scenario(
        "Sentinel failover, with `min-replicas-to-write 1`",
        fail_over("min-replicas-to-write", "1"),
        (*_LOST, LATE, _READ_ONLY),
        certain="the server has too few replicas",
        promotes=True,
    ),
    "cluster-migration": Scenario("Cluster: slots migrate", cluster_migration, in_doubt=False),
    "cluster-death": Scenario(
        "Cluster: a master dies",
        cluster_death,
        (*_LOST, LATE, "the cluster is down", _READ_ONLY),
        promotes=True,
    ),
    "cache-calm": Scenario("none", on_server(nullcontext, 0.0, **_CACHED), in_doubt=False),
    "cache-unsubscribed": Scenario(
        "`CLIENT KILL TYPE pubsub`",
        on_server(unsubscribed, 0.1, often=5, **_CACHED),
        in_doubt=False,
    ),
    "cache-partition": Scenario(
        "no announcements arrive, or nothing arrives", partial(partition, **_CACHED), (*_LOST, LATE)
    ),
    "cache-kill": Scenario(
        "`SIGKILL`, restart after 0.5 s",
        on_server(killed, 0.5, *_DURABLE, **_CACHED),
        _LOST,
        bridged=True,
    ),
    "cache-hang": Scenario(
        "`SIGSTOP` and `SIGCONT`", on_server(hanging, 1.5, **_SLOW, **_CACHED), _LOST, certain=LATE
    ),
    "cache-sentinel": Scenario(
        "Sentinel failover, the master having lost its replica",
        fail_over(**_CACHED),
        (*_LOST, LATE, _READ_ONLY),
        certain=_REFUSED,
        promotes=True,
    ),
    "cache-cluster": Scenario(
        "Cluster: a master dies",
        partial(cluster_death, **_CACHED),
        (*_LOST, LATE, "the cluster is down", _READ_ONLY),
        promotes=True,
    ),
    "password": Scenario(
        "password rotation, with and without an overlap", password, _LOST, certain=WRONG_PASSWORD
    ),
    "clock": Scenario(
        "clock of one process 2 days ahead, then 2 h behind", clock_step, in_doubt=False
    ),
}

WITHOUT_AOF = Scenario(
    "`SIGKILL` and restart, no append-only file",
    on_server(killed, 0.5),
    (*_LOST, "the server is still loading"),
)
"""A scenario in which the suite must find lost writes."""
