"""The servers that other tests rely on do what those tests take for granted."""

import socket
from contextlib import suppress

import pytest
import redis

from tests.servers import Server, ServerError, binaries, deaf_port, free_port, running


def test_ageing_ends_what_runs_out_and_nothing_else(redis_or_valkey: Server) -> None:
    """Half-open, as expiry is: a key that has as long as it is aged by is gone."""
    redis_or_valkey.flush()
    with redis_or_valkey.client() as client:
        for key, seconds in {"ended": 99, "ends": 100, "lives": 160}.items():
            client.set(key, key, ex=seconds)
        client.set("everlasting", "value")

        redis_or_valkey.age(100)

        assert sorted(client.keys()) == [b"everlasting", b"lives"]
        assert 50_000 < client.pttl("lives") <= 60_000
        assert client.pttl("everlasting") == -1


def test_ageing_copes_with_the_longest_ttls(redis_or_valkey: Server) -> None:
    """Milliseconds are counted exactly, beyond what prints as an integer by itself."""
    redis_or_valkey.flush()
    ten_thousand_years = 10_000 * 366 * 86_400_000
    with redis_or_valkey.client() as client:
        client.set("key", "value", px=ten_thousand_years)

        redis_or_valkey.age(1_000)

        left = client.pttl("key")
        assert 0 <= ten_thousand_years - 1_000_000 - left < 60_000


def test_a_server_ends_with_its_block() -> None:
    """Also when it hangs and the block fails; its directory goes with it."""
    with suppress(ZeroDivisionError), running(binaries()["valkey"]) as server:
        server.pause()
        raise ZeroDivisionError

    assert not server.directory.exists()
    with pytest.raises(ConnectionRefusedError), socket.socket() as probe:
        probe.connect(("127.0.0.1", server.port))


def test_a_server_starts_again_where_it_was() -> None:
    """On the same port and the same socket, and as empty as at first."""
    with running(binaries()["valkey"]) as server:
        port = server.port
        with server.client() as client, redis.Redis.from_url(server.unix_url) as local:
            client.set("key", "value")
            assert local.get("key") == b"value"

            server.kill()
            with pytest.raises(redis.ConnectionError):
                client.get("key")
            server.start()

            assert client.get("key") is None
            assert local.get("key") is None
        assert server.port == port


def test_a_paused_server_resumes() -> None:
    """It keeps connections and what it was sent, and answers then."""
    with running(binaries()["valkey"]) as server, socket.socket() as connection:
        connection.connect(("127.0.0.1", server.port))
        server.pause()
        connection.sendall(b"PING\r\n")
        connection.settimeout(0.05)
        with pytest.raises(TimeoutError):
            connection.recv(100)

        server.resume()

        connection.settimeout(10)
        assert connection.recv(100) == b"+PONG\r\n"


def test_a_server_that_cannot_start_says_why() -> None:
    """The error holds the server's own words."""
    with (
        pytest.raises(ServerError, match="nonsense"),
        running(binaries()["valkey"], "--nonsense", "yes"),
    ):
        pass


def test_ports_are_free_or_deaf() -> None:
    """A free port can be taken, together with its cluster bus; a deaf one refuses."""
    port = free_port()
    with socket.socket() as first, socket.socket() as second:
        first.bind(("127.0.0.1", port))
        second.bind(("127.0.0.1", port + 10_000))

    with (
        deaf_port() as port,
        pytest.raises(ConnectionRefusedError),
        socket.socket() as probe,
    ):
        probe.connect(("127.0.0.1", port))
