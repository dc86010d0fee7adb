"""Tests of bad input, unreadable records, and errors."""

import logging
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest

from ..codec import JsonCodec
from ..errors import (
    CorruptSession,
    InvalidSession,
    InvalidSessionId,
    SessionConflict,
    SessionError,
    SessionExists,
    SessionNotFound,
    SessionRotated,
    StorageClosed,
    StorageMisused,
    StorageUnavailable,
)
from ..session import Session, new_session_id
from ..storage import Storage, When
from ._harness import Harness, content, new_session, unchanged
from ._spoiling import UNREADABLE, SpoilingCodec, reader_of_floats

# Of each class, before its base: the status, and the built-in base.
_STATUS: dict[type[SessionError], tuple[int, type[Exception]]] = {
    InvalidSessionId: (400, ValueError),
    InvalidSession: (500, ValueError),
    SessionNotFound: (404, LookupError),
    SessionExists: (409, SessionError),
    SessionRotated: (409, SessionConflict),
    SessionConflict: (409, SessionError),
    CorruptSession: (500, SessionError),
    StorageClosed: (503, SessionError),
    StorageMisused: (500, RuntimeError),
    StorageUnavailable: (503, SessionError),
}

_NAIVE = datetime(2030, 1, 1)  # noqa: DTZ001 - that is the point

_MALFORMED_IDS = {
    "empty": "",
    "too-long": "a" * 257,
    "space": "a b",
    "trailing-newline": "a\n",
    "control-character": "a\x1f",
    "delete": "a\x7f",
    "nul": "a\0",
    "latin-1": "caf\xe9",
    "other-digits": "\u0661",
    "astral": "\U0001f98a",
    "lone-surrogate": "\ud800",
}


def _endless() -> list[Any]:
    endless: list[Any] = []
    endless.append(endless)
    return endless


_UNSTORABLE: dict[str, Callable[[], dict[str, Any]]] = {
    "naive-created-at": lambda: {"created_at": _NAIVE},
    "naive-updated-at": lambda: {"updated_at": _NAIVE},
    "naive-expires-at": lambda: {"expires_at": _NAIVE},
    "unencodable-data": lambda: {"data": object()},
    "unencodable-deep-inside": lambda: {"data": [{"a": [1j]}]},
    "lone-surrogate": lambda: {"data": "\ud800"},
    "endless-data": lambda: {"data": _endless()},
    "too-large-data": lambda: {"data": "x" * 1_000},
    "too-large-metadata": lambda: {"metadata": {"a": "x" * 1_000}},
}
_malformed_ids = pytest.mark.parametrize("id", _MALFORMED_IDS.values(), ids=_MALFORMED_IDS)
_unstorable = pytest.mark.parametrize("fields", _UNSTORABLE.values(), ids=_UNSTORABLE)
_unreadable = pytest.mark.parametrize("spoil", UNREADABLE.values(), ids=UNREADABLE)


def texts_of(error: BaseException) -> Iterator[str]:
    """Yield the texts of an error and of the errors that it is chained to."""
    yield str(error)
    yield repr(error)
    yield from getattr(error, "__notes__", ())
    chained = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    if chained is not None:
        yield from texts_of(chained)
    if isinstance(error, BaseExceptionGroup):
        for one in error.exceptions:  # pyright: ignore[reportUnknownVariableType, reportUnknownMemberType] - a group of any errors
            yield from texts_of(one)  # pyright: ignore[reportUnknownArgumentType] - as above


class Refusing(Harness):
    """Bad input, unreadable records, and errors."""

    @_malformed_ids
    async def test_malformed_id_cannot_be_stored(self, id: str) -> None:
        """An id that is not 1 to 256 visible ASCII characters raises `InvalidSessionId`."""
        storage = await self.open()
        session = Session[Any](id=id, data="something")

        for when in When:
            with unchanged(session), pytest.raises(InvalidSessionId):
                await storage.store(session, when=when)

    @_malformed_ids
    async def test_malformed_id_cannot_be_looked_up(self, id: str) -> None:
        """A malformed id raises `InvalidSessionId`, not `SessionNotFound`."""
        storage = await self.open()

        with pytest.raises(InvalidSessionId):
            await storage.load(id)
        with pytest.raises(InvalidSessionId):
            await storage.delete(id)

    @pytest.mark.parametrize("id", [None, 1, b"id"], ids=repr)
    async def test_id_that_is_not_a_string_is_a_type_error(self, id: Any) -> None:
        """Such an id is a mistake in the program, not in a client's request."""
        storage = await self.open()

        for verb in (storage.load, storage.delete):
            with pytest.raises(TypeError):
                await verb(id)
        with pytest.raises(TypeError):
            await storage.store(Session(id=id))

    @_unstorable
    async def test_unstorable_session_is_not_stored(
        self, fields: Callable[[], dict[str, Any]]
    ) -> None:
        """Naive dates, unencodable data and too large data raise `InvalidSession`."""
        storage = await self.open(codec=JsonCodec(max_bytes=1_000))
        session = new_session(**fields())

        with unchanged(session), pytest.raises(InvalidSession):
            await storage.store(session)

        with pytest.raises(SessionNotFound):
            await storage.load(session.id)

    @_unstorable
    async def test_unstorable_session_overwrites_nothing(
        self, fields: Callable[[], dict[str, Any]]
    ) -> None:
        """The stored session remains, with its content."""
        storage = await self.open(codec=JsonCodec(max_bytes=1_000))
        stored = new_session(data="in order")
        await storage.store(stored)
        session = msgspec.structs.replace(stored, **fields())

        for when in When:
            with unchanged(session), pytest.raises((InvalidSession, SessionExists)):
                await storage.store(session, when=when)

        assert content(await storage.load(stored.id)) == content(stored)

    async def test_default_codec_limits_the_size(self) -> None:
        """A storage that is made without a codec refuses two megabytes."""
        storage = await self.open()
        session = new_session(data="x" * 2_000_000)

        with unchanged(session), pytest.raises(InvalidSession):
            await storage.store(session)

    async def _store_unreadable(
        self, spoil: Callable[[Session[Any]], bytes]
    ) -> tuple[Storage[Any], Session[Any]]:
        """Store a session that cannot be read. Later writes of the storage can be read."""
        codec = reader_of_floats()
        storage = await self.open(codec=codec)
        session = new_session(data=1.5)
        codec.spoil = spoil
        await storage.store(session)
        codec.spoil = None
        return storage, session

    @_unreadable
    async def test_unreadable_record_is_corrupt(
        self, spoil: Callable[[Session[Any]], bytes]
    ) -> None:
        """A load raises `CorruptSession`; it returns neither an empty nor another session."""
        storage, session = await self._store_unreadable(spoil)

        for _ in range(2):
            with pytest.raises(CorruptSession):
                await storage.load(session.id)

    @_unreadable
    async def test_unreadable_record_can_be_overwritten(
        self, spoil: Callable[[Session[Any]], bytes]
    ) -> None:
        """`ALWAYS` writes over it."""
        storage, session = await self._store_unreadable(spoil)

        await storage.store(session)

        assert content(await storage.load(session.id)) == content(session)

    @_unreadable
    async def test_unreadable_record_can_be_deleted(
        self, spoil: Callable[[Session[Any]], bytes]
    ) -> None:
        """`delete` removes it and returns True."""
        storage, session = await self._store_unreadable(spoil)

        assert await storage.delete(session.id) is True
        with pytest.raises(SessionNotFound):
            await storage.load(session.id)

    @_unreadable
    async def test_unreadable_record_is_not_absent(
        self, spoil: Callable[[Session[Any]], bytes]
    ) -> None:
        """`ABSENT` does not write over it, whether or not the storage decodes it."""
        storage, session = await self._store_unreadable(spoil)

        with unchanged(session), pytest.raises((SessionExists, CorruptSession)):
            await storage.store(session, when=When.ABSENT)

        with pytest.raises(CorruptSession):
            await storage.load(session.id)

    async def test_errors_of_a_codec_reach_the_caller(self) -> None:
        """A `CorruptSession` or `InvalidSession` that a codec raises keeps its message."""
        codec = SpoilingCodec()
        storage = await self.open(codec=codec)
        session = new_session()
        await storage.store(session)

        codec.refusal = CorruptSession("a newer format than this release reads")
        with pytest.raises(CorruptSession, match="newer format"):
            await storage.load(session.id)
        codec.refusal = InvalidSession("not like this")
        with unchanged(session), pytest.raises(InvalidSession, match="not like this"):
            await storage.store(session)

    async def _errors(self, secret: str) -> list[Exception]:
        """Provoke the errors of every mistake that is possible with any storage.

        Each field of each session holds `secret`. Other tests check that each mistake is an error.
        """
        errors: list[Exception] = []

        async def provoke(verb: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
            try:
                await verb(*args, **kwargs)
            except Exception as error:  # noqa: BLE001 - the tests judge its class
                errors.append(error)

        def session(suffix: str = "", **fields: Any) -> Session[Any]:
            given: dict[str, Any] = {"metadata": {secret: secret}, "data": {secret: secret}}
            id = f"{secret}{new_session_id()}{suffix}"
            return Session(id=id, principal=secret, **(given | fields))

        storage = await self.open()
        stored, stale, never = session(), session(), session()
        await storage.store(stored)
        await storage.store(stale)
        await storage.store(await storage.load(stale.id))

        for verb in (storage.load, storage.delete):
            for suffix in (" ", "\n", "\xe9", "\ud800", "x" * 257):
                await provoke(verb, secret + suffix)
        for unstorable in (
            session("\xe9"),
            session(data={secret: object()}),
            session(data={secret: secret + "\ud800"}),
            session(metadata={secret: secret + "\ud800"}),
            session(data=secret * 300_000),
            session(expires_at=_NAIVE),
        ):
            await provoke(storage.store, unstorable)
        await provoke(storage.load, never.id)
        await provoke(storage.store, never, when=When.PRESENT)
        await provoke(storage.store, never, when=When.UNCHANGED)
        await provoke(storage.store, stored, when=When.ABSENT)
        await provoke(storage.store, stale, when=When.UNCHANGED)
        codec = reader_of_floats()
        reader = await self.open(codec=codec)
        for codec.spoil in (
            *UNREADABLE.values(),
            lambda _: secret.encode(),
            lambda session: msgspec.json.encode({"id": session.id, "metadata": {secret: [secret]}}),
            lambda session: msgspec.json.encode({"id": session.id, "created_at": secret}),
        ):
            unreadable = session()
            await reader.store(unreadable)
            await provoke(reader.load, unreadable.id)
        await storage.aclose()
        await provoke(storage.load, stored.id)
        await provoke(storage.store, stored)
        return errors

    async def test_errors_have_a_status(self) -> None:
        """Each error is one of the package's classes, with its HTTP status and built-in base."""
        for error in await self._errors("secret"):
            assert isinstance(error, SessionError)
            kind = next(kind for kind in _STATUS if isinstance(error, kind))
            status, base = _STATUS[kind]
            assert (kind, error.status, isinstance(error, base)) == (kind, status, True)

    async def test_errors_hold_no_secrets(self) -> None:
        """No id and no content is in an error, nor in an error that it is chained to."""
        secret = "hush" + new_session_id()

        errors = await self._errors(secret)

        assert [text for error in errors for text in texts_of(error) if secret in text] == []

    async def test_logs_hold_no_secrets(self, caplog: pytest.LogCaptureFixture) -> None:
        """No log record, at any level, holds an id or content."""
        caplog.set_level(logging.DEBUG)
        secret = "hush" + new_session_id()

        await self._errors(secret)

        assert secret not in caplog.text

    async def test_repr_holds_no_sessions(self) -> None:
        """The `repr` of a storage holds no id and no content."""
        storage = await self.open()
        session = new_session(data="hush", created_at=datetime.now(UTC))

        await storage.store(session)

        assert session.id not in repr(storage)
        assert "hush" not in repr(storage)
