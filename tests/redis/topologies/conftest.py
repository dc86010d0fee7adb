"""A cluster, a replicated cluster and a master with Sentinels, each started once."""

from collections.abc import Iterator

import pytest

from tests.support.servers import binaries
from tests.support.topologies import QUIET, Cluster, Watched, cluster, watched


def emptied(nodes: Cluster) -> Cluster:
    """Wait until all nodes agree, and remove every key."""
    nodes.settle()
    nodes.flush()
    return nodes


@pytest.fixture(scope="session")
def shared_cluster() -> Iterator[Cluster]:
    """Three masters."""
    with cluster(binaries()["valkey"], node_timeout=QUIET) as made:
        yield made


@pytest.fixture
def nodes(shared_cluster: Cluster) -> Cluster:
    """The three masters, empty, after all nodes agree."""
    return emptied(shared_cluster)


@pytest.fixture(scope="session")
def shared_replicated() -> Iterator[Cluster]:
    """Three masters, each with a replica."""
    with cluster(binaries()["valkey"], replicas=1, node_timeout=QUIET) as made:
        yield made


@pytest.fixture
def replicated(shared_replicated: Cluster) -> Cluster:
    """The replicated cluster, empty, after all nodes agree."""
    return emptied(shared_replicated)


@pytest.fixture(scope="session")
def shared_sentinels() -> Iterator[Watched]:
    """A master, a replica and three Sentinels."""
    with watched(binaries()["valkey"]) as made:
        yield made


@pytest.fixture
def sentinels(shared_sentinels: Watched) -> Watched:
    """The same servers, empty, and ready for a failover."""
    shared_sentinels.settle()
    shared_sentinels.master().flush()
    return shared_sentinels
