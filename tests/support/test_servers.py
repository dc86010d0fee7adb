"""The servers for tests: ageing, starting and ending."""

import socket
from contextlib import suppress

import pytest
import redis

from tests.support.servers import Server, ServerError, binaries, running


def test_ageing_removes_expired_keys_only(redis_or_valkey: Server) -> None:
    """A key with a TTL of exactly the age is gone, because expiry is half-open."""
    redis_or_valkey.flush()
    with redis_or_valkey.client() as client:
        for key, seconds in {"ended": 99, "ends": 100, "lives": 160}.items():
            client.set(key, key, ex=seconds)
        client.set("persistent", "value")

        redis_or_valkey.age(100)

        assert sorted(client.keys()) == [b"lives", b"persistent"]
        assert 50_000 < client.pttl("lives") <= 60_000
        assert client.pttl("persistent") == -1


def test_ageing_works_for_the_longest_ttl(redis_or_valkey: Server) -> None:
    """Lua would print so large a number of milliseconds as a float."""
    redis_or_valkey.flush()
    ten_thousand_years = 10_000 * 366 * 86_400_000
    with redis_or_valkey.client() as client:
        client.set("key", "value", px=ten_thousand_years)

        redis_or_valkey.age(1_000)

        left = client.pttl("key")
        assert 0 <= ten_thousand_years - 1_000_000 - left < 60_000


def test_server_restarts_on_its_port_and_ends_with_its_block() -> None:
    """A restarted server is empty; even a paused one ends after an error."""
    with suppress(ZeroDivisionError), running(binaries()["valkey"]) as server:
        with server.client() as client:
            client.set("key", "value")
            server.kill()
            with pytest.raises(redis.ConnectionError):
                client.get("key")
            server.start()
            assert client.get("key") is None
        server.pause()
        raise ZeroDivisionError

    assert not server.directory.exists()
    with pytest.raises(ConnectionRefusedError), socket.socket() as probe:
        probe.connect(("127.0.0.1", server.port))


def test_failed_start_tells_the_reason() -> None:
    """The error contains the log of the server."""
    with (
        pytest.raises(ServerError, match="nonsense"),
        running(binaries()["valkey"], "--nonsense", "yes"),
    ):
        pass
