"""No session id is on the server: in no command, key, value, file or log.

Data, metadata and principals are there, unless they are encrypted.
"""

import base64
import secrets
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import pytest
from redis.asyncio import Redis, RedisCluster

from aiosessions import (
    Codec,
    CorruptSession,
    EncryptedCodec,
    InvalidSession,
    JsonCodec,
    Session,
    SessionConflict,
    SessionExists,
    SessionManager,
    SessionNotFound,
    SessionRotated,
    StorageUnavailable,
    When,
    new_session_id,
    session_digest,
)
from aiosessions.testing import FakeClock
from tests.support.clients import Caller, Storage, key_of, outcome
from tests.support.servers import Server, binaries, running
from tests.support.topologies import ask, cluster, eventually

pytestmark = pytest.mark.usefixtures("short_bridge")

SETTINGS = {
    "slowlog-log-slower-than": "0",
    "slowlog-max-len": "100000",
    "latency-monitor-threshold": "1",
    "rdbcompression": "no",  # so that a search of the file finds everything
    "appendonly": "yes",
}
USER = "guest"
"""A user who may read no session, so that the server logs denied commands."""
CODECS: dict[str, Callable[[], Codec[Any]]] = {
    "plain": JsonCodec,
    "encrypted": lambda: EncryptedCodec(JsonCodec(), [bytes(32)]),
}


@dataclass
class Target:
    """A server, and a function that opens storages on it."""

    server: Server
    open: Callable[..., AbstractAsyncContextManager[Storage]]


CLUSTER = pytest.param("cluster", marks=pytest.mark.slow)


@pytest.fixture(scope="module", params=[*binaries(), CLUSTER])
def target(request: pytest.FixtureRequest) -> Iterator[Target]:
    """Each available server in turn, and a node of a cluster."""
    kind: Any = RedisCluster if request.param == "cluster" else Redis
    valkey = binaries()["valkey"]
    with (
        cluster(valkey, masters=1)
        if kind is RedisCluster
        else running(binaries()[request.param]) as made
    ):
        server = made if isinstance(made, Server) else made.nodes[0]

        @asynccontextmanager
        async def open(user: str | None = None, **settings: Any) -> AsyncIterator[Storage]:
            async with (
                kind(host="127.0.0.1", port=server.port, username=user, password=user) as client,
                Storage(client, **settings) as storage,
            ):
                yield storage

        for name, value in SETTINGS.items():
            ask(server, "CONFIG", "SET", name, value)
        ask(server, "ACL", "SETUSER", USER, "on", f">{USER}", "~other:*", "+@all")
        eventually(lambda: not ask(server, "INFO", "persistence")["aof_rewrite_in_progress"])
        yield Target(server, open)


@contextmanager
def monitored(server: Server) -> Iterator[bytearray]:
    """The commands that a server gets during the block; complete after it."""
    end, heard = secrets.token_hex().encode(), bytearray()
    with socket.create_connection(("127.0.0.1", server.port)) as monitor:
        monitor.sendall(b"MONITOR\r\n")
        assert monitor.recv(5) == b"+OK\r\n"
        yield heard
        ask(server, "ECHO", end.decode())
        while end not in heard:
            heard += monitor.recv(1 << 20)


def spellings(text: str) -> set[bytes]:
    """A text as it is, in hexadecimal digits, and in base64 at any offset."""
    raw = text.encode()
    found = {raw, raw.hex().encode(), raw.hex().upper().encode()}
    for offset in range(3):
        whole = (offset + len(raw)) // 3 * 3  # the rest depends on the bytes that follow
        padded = (bytes(offset) + raw)[:whole]
        for encode in (base64.b64encode, base64.urlsafe_b64encode):
            found.add(encode(padded)[offset and offset + 1 :])
    return found


def traces(server: Server) -> dict[str, bytes]:
    """The texts that a server shows and stores, by their place."""
    with server.client() as client:
        client.save()
        shown = {
            "KEYS": client.keys("*"),
            "SLOWLOG": client.slowlog_get(-1),
            "CLIENT LIST": client.client_list(),
            "ACL LOG": client.acl_log(),
            "INFO": client.info("everything"),
            "LATENCY": client.execute_command("LATENCY DOCTOR"),
            "MEMORY": client.execute_command("MEMORY DOCTOR"),
        }
    files = [path for path in server.directory.rglob("*") if path.is_file()]
    found = {path.name: path.read_bytes() for path in files}
    return {place: repr(each).encode() for place, each in shown.items()} | found


@dataclass
class Workload:
    """Uses every verb, with success and with every refusal.

    Attributes:
        ids: The ids that it used.
        principal: The owner of its sessions.
        secret: A text in data and metadata.
    """

    target: Target
    codec: Codec[Any]
    clock: FakeClock = field(default_factory=FakeClock)
    ids: list[str] = field(default_factory=list)
    principal: str = field(default_factory=new_session_id)
    secret: str = field(default_factory=new_session_id)

    def id(self) -> str:
        """A new id."""
        self.ids.append(new_session_id())
        return self.ids[-1]

    def open(self, **settings: Any) -> AbstractAsyncContextManager[Storage]:
        """Open a storage."""
        ours = {"ttl": 60, "codec": self.codec, "clock": self.clock}
        return self.target.open(**ours | settings)

    async def create(self, sessions: SessionManager[Any], **fields: Any) -> Session[Any]:
        """Create a session with secrets."""
        settings: Any = {"id": self.id(), "metadata": {"note": self.secret}, "data": self.secret}
        return await sessions.create(**settings | fields)

    async def run(self) -> None:
        """Use everything, on a server that does not know the scripts."""
        ask(self.target.server, "SCRIPT", "FLUSH")
        async with self.open() as storage, self.open(user=USER) as denied:
            caller = Caller(storage, self.id)
            await caller.use_all_verbs()
            assert (caller.wrong, caller.unavailable) == ([], [])
            await self._use_manager(storage)
            ask(self.target.server, "SCRIPT", "FLUSH")
            await self._use_principal(storage)
            await self._meet_errors(storage, denied)

    async def _use_manager(self, storage: Storage) -> None:
        sessions = SessionManager[Any](storage, max_lifetime=3600, clock=self.clock)
        session = await self.create(sessions)
        stale = await sessions.get(session.id, principal=None)
        await sessions.save(session)
        assert await outcome(sessions.save(stale)) is SessionConflict
        assert await outcome(self.create(sessions, id=session.id)) is SessionExists
        assert await outcome(self.create(sessions, data=object())) is InvalidSession
        await sessions.mutate(session.id, lambda each: each.metadata.clear())
        moved = await sessions.rotate(session.id, new_id=self.id())
        assert await outcome(sessions.save(session)) is SessionRotated
        sudden = SessionManager[Any](storage, grace=0, clock=self.clock)
        drawn = await sudden.rotate(moved)
        self.ids.append(drawn.id)
        assert await sessions.delete(drawn.id)
        assert await outcome(sessions.get(drawn.id)) is SessionNotFound

    async def _use_principal(self, storage: Storage) -> None:
        mine: Any = {"principal": self.principal}
        sessions = SessionManager[Any](storage, max_per_principal=3, clock=self.clock)
        *_, last = [await self.create(sessions, **mine) for _ in range(4)]  # one too many
        assert await outcome(sessions.get(last.id, principal="other")) is SessionNotFound
        async with self.open(ttl=600) as patient:  # a longer TTL needs a longer lease
            await patient.load(last.id)
            await SessionManager[Any](patient, clock=self.clock).save(last)
        moved = await sessions.rotate(last, new_id=self.id())
        digests = {info.digest for info in await sessions.list(self.principal)}
        assert await sessions.count(self.principal) == len(digests) == 3
        assert await sessions.revoke(self.principal, min(digests - {moved.digest}))
        assert await sessions.revoke_all(self.principal, keep=moved.id) == 1
        assert await sessions.get(moved.id, **mine)
        await self.create(sessions, **mine)
        # A session past its deadline, which a load removes.
        end = self.clock.now() + timedelta(seconds=20)
        dying = Session[Any](id=self.id(), expires_at=end, **mine)
        await storage.store(dying)
        self.clock.advance(20)
        assert await outcome(storage.load(dying.id)) is SessionNotFound

    async def _meet_errors(self, storage: Storage, denied: Storage) -> None:
        broken, misplaced = self.id(), self.id()
        with self.target.server.client() as client:
            client.set(key_of(broken), "no record")
            client.rpush(key_of(misplaced), "no record")
        for id in (broken, misplaced):
            session = Session[Any](id=id, principal=self.principal, revision="x")
            for verb in (storage.load(id), storage.store(session, when=When.UNCHANGED)):
                assert issubclass(await outcome(verb), CorruptSession | StorageUnavailable)
            revoked = storage.revoke(self.principal, session.digest)
            assert await outcome(revoked) is CorruptSession
        session = Session[Any](id=self.id(), principal=self.principal, data=self.secret)
        for refused in (
            denied.load(session.id),
            denied.delete(session.id),
            *(denied.store(session, when=when) for when in When),
            denied.list(self.principal),
            denied.count(self.principal),
            denied.revoke(self.principal, session.digest),
            denied.revoke_all(self.principal, keep=session.id),
            denied.trim(self.principal, 1, keep=session.id),
        ):
            assert await outcome(refused) is StorageUnavailable


@pytest.mark.parametrize("kind", CODECS)
async def test_no_secret_is_on_the_server(target: Target, kind: str) -> None:
    """A search of commands, keys, values, files and logs finds digests only."""
    server = target.server
    server.flush()
    for log in ("SLOWLOG", "ACL LOG"):
        ask(server, log, "RESET")
    workload = Workload(target, CODECS[kind]())

    with monitored(server) as monitor:
        await workload.run()
    found = traces(server) | {"MONITOR": bytes(monitor)}

    digests = [session_digest(id).encode() for id in workload.ids]
    places = {place for place, text in found.items() if any(each in text for each in digests)}
    assert {"MONITOR", "SLOWLOG", "KEYS", "ACL LOG", "dump.rdb"} <= places
    assert any("appendonly" in place for place in places)
    hidden, readable = [*workload.ids], [workload.principal, workload.secret]
    if kind == "plain":
        assert all(each.encode() in found["MONITOR"] for each in readable)
    else:
        hidden += readable
    assert found_in(found, hidden) == []


def found_in(found: dict[str, bytes], hidden: list[str]) -> list[str]:
    """The places where a text is found in any spelling."""
    return [
        place
        for place, text in found.items()
        if any(each in text for one in hidden for each in spellings(one))
    ]


@pytest.mark.parametrize("offset", range(3))
def test_search_finds_every_spelling(offset: int) -> None:
    """It finds an id inside of a longer text that is encoded."""
    id = new_session_id()
    text = b"~" * offset + id.encode() + b"?"
    for encode in (bytes, bytes.hex, base64.b64encode, base64.urlsafe_b64encode):
        shown: Any = encode(text)
        place = shown.encode() if isinstance(shown, str) else shown
        assert found_in({"here": place}, [id]) == ["here"]
        assert found_in({"here": place}, [new_session_id()]) == []
