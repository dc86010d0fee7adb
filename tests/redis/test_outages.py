"""`RedisStorage` while its server hangs, restarts or is down, and afterwards."""

import asyncio
import logging
import re
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager
from typing import Any

import anyio
import msgspec
import pytest

from aiosessions import RedisStorage, Session, StorageUnavailable, When, new_session_id
from tests.support.proxy import Fault, FaultProxy, replace, reset, swallow
from tests.support.secrets import chain_of, locals_in
from tests.support.servers import Server, binaries, running

# Longer than any step takes.
_TIMEOUT = 20.0


@pytest.fixture(scope="module", params=binaries())
def fragile(request: pytest.FixtureRequest) -> Iterator[Server]:
    """A server of this module, which keeps its data when it restarts."""
    durable = ("--appendonly", "yes", "--appendfsync", "always")
    with running(binaries()[request.param], *durable) as server:
        yield server


@contextmanager
def paused(server: Server) -> Iterator[None]:
    """Stop the process: connections stay open, and nothing is answered."""
    server.pause()
    try:
        yield
    finally:
        server.resume()


@contextmanager
def client_pause(server: Server) -> Iterator[None]:
    """Make the server hold back writing commands, GETEX and scripts included."""
    with server.client() as client:
        client.client_pause(60_000, all=False)
        try:
            yield
        finally:
            client.client_unpause()


@asynccontextmanager
async def killed(server: Server) -> AsyncIterator[None]:
    """End the process, and start it again afterwards."""
    server.kill()
    try:
        yield
    finally:
        await asyncio.to_thread(server.start)


def verbs(storage: RedisStorage[Any], session: Session[Any]) -> list[Any]:
    """One call of each verb; the load comes first."""
    return [
        storage.load(session.id),
        storage.delete(new_session_id()),
        *(storage.store(msgspec.structs.replace(session), when=when) for when in When),
    ]


async def errors_of(storage: RedisStorage[Any], session: Session[Any]) -> list[StorageUnavailable]:
    """The errors of the verbs, which are called at once."""
    with anyio.fail_after(_TIMEOUT):
        results = await asyncio.gather(*verbs(storage, session), return_exceptions=True)
    errors = [result for result in results if isinstance(result, StorageUnavailable)]
    assert errors == results
    return errors


async def recovered(storage: RedisStorage[Any]) -> None:
    """Wait until the storage works again."""
    with anyio.fail_after(_TIMEOUT):
        while True:
            try:
                session = Session[Any](id=new_session_id())
                await storage.store(session, when=When.ABSENT)
                assert await storage.load(session.id) == session
                assert await storage.delete(session.id) is True
            except StorageUnavailable:
                await anyio.sleep(0.01)
            else:
                return


@pytest.mark.parametrize(
    ("stop", "later_in_doubt"),
    # A server that hangs takes no new connection, so nothing more is written.
    [(paused, False), (client_pause, True)],
    ids=["stopped", "write-pause"],
)
async def test_hanging_server_fails_verbs_in_time(
    fragile: Server,
    stop: Callable[[Server], AbstractContextManager[None]],
    later_in_doubt: bool,  # noqa: FBT001 - a parameter of the test
) -> None:
    """Every verb ends with its timeout, and a write is in doubt if it was written to the socket."""
    async with RedisStorage[Any].from_url(fragile.url, ttl=60, timeout=0.25) as storage:
        session = Session[Any](id=new_session_id(), data=1)
        await storage.store(session)
        reason = f"the server did not answer in time (127.0.0.1:{fragile.port})"

        with stop(fragile):
            for in_doubt in (True, later_in_doubt):
                load, *writes = await errors_of(storage, session)
                assert (str(load), load.in_doubt) == (reason, False)
                assert {error.in_doubt for error in writes} == {in_doubt}
                suffix = "; the write may have been applied" if in_doubt else ""
                assert {str(error) for error in writes} == {reason + suffix}

        await recovered(storage)
        assert (await storage.load(session.id)).data == 1


async def test_server_may_hang_from_the_start(fragile: Server) -> None:
    """The timeout bounds connecting, too; the storage works when the server goes on."""
    async with RedisStorage[Any].from_url(fragile.url, ttl=60, timeout=0.25) as storage:
        with paused(fragile):
            errors = await errors_of(storage, Session(id=new_session_id()))

        assert not any(error.in_doubt for error in errors)
        await recovered(storage)


async def test_hanging_server_does_not_delay_closing(fragile: Server) -> None:
    """`aclose` waits for no reply, and the callers that wait for one get `StorageClosed`."""
    async with RedisStorage[Any].from_url(fragile.url, ttl=60, timeout=10) as storage:
        with paused(fragile), anyio.fail_after(5):
            async with anyio.create_task_group() as tasks:

                async def load() -> None:
                    with pytest.raises(Exception, match="closed"):
                        await storage.load("x")

                tasks.start_soon(load)
                await anyio.wait_all_tasks_blocked()
                await storage.aclose()


async def test_storage_works_again_after_an_outage(fragile: Server) -> None:
    """While the server is down, the errors name the reason and the address; none is in doubt."""
    async with RedisStorage[Any].from_url(fragile.url, ttl=60) as storage:
        async with killed(fragile):
            errors = await errors_of(storage, Session(id=new_session_id()))
            errors += await errors_of(storage, Session(id=new_session_id()))
        reason = f"cannot connect: Connection refused (127.0.0.1:{fragile.port})"
        assert {str(error) for error in errors} == {reason}
        assert not any(error.in_doubt for error in errors)
        await recovered(storage)


async def test_short_restart_fails_no_retryable_verb(fragile: Server) -> None:
    """A restart of 0.3 s fails no load and no compare-and-set, and applies each write once."""
    done = asyncio.Event()

    async def use(storage: RedisStorage[Any]) -> int:
        session = Session[Any](id=new_session_id(), data=0)
        await storage.store(session)
        while not done.is_set():
            session.data += 1
            await storage.store(session, when=When.UNCHANGED)
            assert (await storage.load(session.id)).data == session.data
        return int(session.data)

    async with (
        RedisStorage[Any].from_url(fragile.url, ttl=60, timeout=5) as storage,
        asyncio.TaskGroup() as tasks,
    ):
        users = [tasks.create_task(use(storage)) for _ in range(20)]
        await asyncio.sleep(0.1)
        async with killed(fragile):
            await asyncio.sleep(0.3)
        with anyio.fail_after(_TIMEOUT):
            while not storage.statistics().reconnects:  # noqa: ASYNC110 - it sets no event
                await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        done.set()

    assert min(user.result() for user in users) > 0


async def test_log_has_beginning_and_end_of_outage(
    fragile: Server, caplog: pytest.LogCaptureFixture
) -> None:
    """Two lines an outage, with the address, however many calls fail; no ids or payloads."""
    caplog.set_level(logging.DEBUG, "aiosessions")
    session = Session[Any](id=new_session_id(), data="payload")
    async with RedisStorage[Any].from_url(fragile.url, ttl=60) as storage:
        await storage.store(session)
        for _ in range(2):
            async with killed(fragile):
                for _ in range(3):
                    await errors_of(storage, session)
            await recovered(storage)

    address = re.escape(f"127.0.0.1:{fragile.port}")
    begin = rf"no connection to {address}: (the (server|connection) |cannot connect).*"
    end = rf"connected to {address} again after \d+\.\d s"
    assert re.fullmatch("\n".join([begin, end] * 2), "\n".join(caplog.messages))
    assert {record.levelname for record in caplog.records} == {"WARNING"}


FAULTS: dict[str, tuple[str, Fault]] = {
    "reset": ("on_request", reset),
    "timeout": ("on_request", swallow),
    "nonsense": ("on_reply", replace(b"!?\r\n")),
    "wrong-type": ("on_reply", replace(b":1\r\n")),
    "refusal": ("on_reply", replace(b"-READONLY You can't write against a read only replica.\r\n")),
    "error-reply": ("on_reply", replace(b"-ERR unknown\r\n")),
}


@pytest.mark.parametrize(("where", "fault"), FAULTS.values(), ids=FAULTS)
async def test_tracebacks_hold_nothing_of_other_callers(
    valkey: Server, where: str, fault: Fault
) -> None:
    """Error trackers record the locals of frames, so no chained error has frames.

    The frames of the error itself belong to its own caller.
    """
    sessions = [Session[Any](id=new_session_id(), data=new_session_id()) for _ in range(20)]
    secrets = {secret for session in sessions for secret in (session.id, session.data)}
    async with (
        FaultProxy(valkey.port) as proxy,
        RedisStorage[Any].from_url(proxy.url, ttl=60, timeout=0.3) as storage,
    ):
        await storage.store(Session(id="first"))
        getattr(proxy, where)("*", fault, times=float("inf"))
        results = await asyncio.gather(
            *(storage.store(session) for session in sessions),
            *(storage.load(session.id) for session in sessions),
            return_exceptions=True,
        )

    for session, error in zip(sessions * 2, results, strict=True):
        assert isinstance(error, StorageUnavailable)
        assert error.__cause__ is not None
        assert [each.__traceback__ for each in chain_of(error)[1:]] == [None]
        told = locals_in(error)
        assert [each for each in secrets - {session.id, session.data} if each in told] == []
