"""`RedisStorage` while its server hangs, restarts or is down, and afterwards."""

import asyncio
import logging
import re
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager
from functools import partial
from typing import Any

import pytest

from aiosessions import Session, StorageUnavailable, When, new_session_id
from tests.support.clients import LONG, Storage, recovered, storage_at, stored, turns, use
from tests.support.proxy import Fault, FaultProxy, replace, reset, swallow, until
from tests.support.secrets import VERBS, chain_of, locals_in
from tests.support.servers import Server, binaries, running

Jump = Callable[[float], None]


@pytest.fixture(scope="module", params=binaries())
def fragile_server(request: pytest.FixtureRequest) -> Iterator[Server]:
    """A server that keeps its data when it restarts."""
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


def call_all(storage: Storage) -> list["asyncio.Task[Any]"]:
    """Call every verb at once; the load is the first."""
    session = Session[Any](id=new_session_id())
    return [asyncio.ensure_future(verb(storage, session)) for verb in VERBS.values()]


def is_in_flight(storage: Storage, number: int) -> bool:
    """Whether so many commands were written and wait for their replies."""
    return storage.statistics().in_flight == number


async def errors_of(calls: list["asyncio.Task[Any]"]) -> list[StorageUnavailable]:
    """The errors of calls, which all fail."""
    results = await asyncio.gather(*calls, return_exceptions=True)
    errors = [result for result in results if isinstance(result, StorageUnavailable)]
    assert errors == results
    return errors


@pytest.mark.parametrize(
    ("stop", "later"),
    # A server that hangs takes no new connection, so nothing more is written.
    [(paused, 0), (client_pause, len(VERBS))],
    ids=["stopped", "write-pause"],
)
async def test_write_to_hanging_server_is_in_doubt(
    fragile: Server, jump: Jump, stop: Callable[[Server], AbstractContextManager[None]], later: int
) -> None:
    """Every verb ends with its timeout, and a write is in doubt if it was written to the socket."""
    async with storage_at(fragile.url) as storage:
        session = await stored(storage, data=1)
        reason = f"the server did not answer in time (127.0.0.1:{fragile.port})"

        with stop(fragile):
            for in_flight in (len(VERBS), later):
                calls = call_all(storage)
                await turns(3)
                await until(partial(is_in_flight, storage, in_flight))
                jump(LONG)
                load, *writes = await errors_of(calls)
                assert (str(load), load.in_doubt) == (reason, False)
                assert {error.in_doubt for error in writes} == {in_flight > 0}
                suffix = "; the write may have been applied" if in_flight else ""
                assert {str(error) for error in writes} == {reason + suffix}

        await recovered(storage, session)


@pytest.mark.usefixtures("short_bridge")
async def test_outage_is_logged_twice_and_explained(
    fragile: Server, caplog: pytest.LogCaptureFixture
) -> None:
    """The log has beginning and end; errors name the reason, and none is in doubt."""
    caplog.set_level(logging.DEBUG, "aiosessions")
    address = f"127.0.0.1:{fragile.port}"
    async with storage_at(fragile.url) as storage:
        for _ in range(2):
            await recovered(storage)
            async with killed(fragile):
                await until(lambda: not storage.statistics().connected)
                for _ in range(3):
                    errors = await errors_of(call_all(storage))
                    assert {str(error) for error in errors} == {
                        f"cannot connect: Connection refused ({address})"
                    }
                    assert not any(error.in_doubt for error in errors)
        await recovered(storage)
        await use(storage)

    begin = rf"no connection to {re.escape(address)}: (the (server|connection) |cannot connect).*"
    end = rf"connected to {re.escape(address)} again after \d+\.\d s"
    assert re.fullmatch("\n".join([begin, end] * 2), "\n".join(caplog.messages))
    assert {record.levelname for record in caplog.records} == {"WARNING"}


@pytest.mark.usefixtures("long_bridge")
async def test_short_restart_fails_no_retryable_verb(fragile: Server) -> None:
    """A restart fails no load and no compare-and-set, and applies each write once."""
    done = asyncio.Event()
    rounds = 0

    async def increment(storage: Storage) -> None:
        nonlocal rounds
        session = await stored(storage, data=0)
        while not done.is_set():
            session.data += 1
            await storage.store(session, when=When.UNCHANGED)
            assert (await storage.load(session.id)).data == session.data
            rounds += 1

    async with storage_at(fragile.url) as storage, asyncio.TaskGroup() as tasks:
        for _ in range(20):
            tasks.create_task(increment(storage))
        await until(lambda: rounds > 100)
        async with killed(fragile):
            await until(lambda: not storage.statistics().connected)
        before = rounds
        await until(lambda: rounds > before + 100)
        done.set()

    assert storage.statistics().reconnects >= 1


FAULTS: dict[str, tuple[str, Fault]] = {
    "reset": ("on_request", reset),
    "timeout": ("on_request", swallow),
    "nonsense": ("on_reply", replace(b"!?\r\n")),
    "wrong-type": ("on_reply", replace(b"*0\r\n")),
    "refusal": ("on_reply", replace(b"-READONLY You can't write against a read only replica.\r\n")),
    "error-reply": ("on_reply", replace(b"-ERR unknown\r\n")),
}


@pytest.mark.usefixtures("short_bridge")
@pytest.mark.parametrize(("where", "fault"), FAULTS.values(), ids=FAULTS)
async def test_tracebacks_hold_nothing_of_other_callers(
    proxy: FaultProxy, where: str, fault: Fault
) -> None:
    """Error trackers record the locals of frames, so no chained error has frames.

    The frames of the error itself belong to its own caller.
    """
    sessions = [Session[Any](id=new_session_id(), data=new_session_id()) for _ in range(10)]
    secrets = {secret for session in sessions for secret in (session.id, session.data)}
    async with storage_at(proxy.url, timeout=0.2) as storage:
        await recovered(storage)
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
        shown = locals_in(error)
        assert [each for each in secrets - {session.id, session.data} if each in shown] == []


@pytest.mark.usefixtures("short_bridge")
async def test_list_that_fails_has_the_cause(proxy: FaultProxy) -> None:
    """The cause of the error of one of several commands is its only context."""
    async with storage_at(proxy.url) as storage:
        await stored(storage, principal="alice")
        proxy.on_reply("GETEX", replace(b"-READONLY\r\n"), times=float("inf"))
        with pytest.raises(StorageUnavailable) as caught:
            await storage.list("alice")

    assert len(chain_of(caught.value)) == 2
    assert caught.value.__cause__ is not None
