"""What storages refuse, what they cannot read, and what their errors say, and do not say."""

import logging
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest

from ..codec import JsonCodec, MsgpackCodec
from ..errors import (
    CorruptSession,
    InvalidSession,
    SessionConflict,
    SessionError,
    SessionExists,
    SessionNotFound,
    StorageClosed,
    StorageUnavailable,
)
from ..session import Session, new_session_id
from ..storage import Storage, When
from ._harness import Harness, SpoilingCodec, content, new_session, unchanged

_STATUS: list[tuple[type[SessionError], int, type[Exception]]] = [
    (InvalidSession, 400, ValueError),
    (SessionNotFound, 404, LookupError),
    (SessionExists, 409, SessionError),
    (SessionConflict, 409, SessionError),
    (CorruptSession, 500, SessionError),
    (StorageClosed, 503, SessionError),
    (StorageUnavailable, 503, SessionError),
]

_NAIVE = datetime(2030, 1, 1)  # noqa: DTZ001 - that is the point

_BAD_IDS = {
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


def _truncated(session: Session[Any]) -> bytes:
    return JsonCodec[Any]().encode(session)[:-1]


def _swapped(session: Session[Any]) -> bytes:
    other = msgspec.structs.replace(session, id=new_session_id())
    return JsonCodec[Any]().encode(other)


_UNREADABLE: dict[str, Callable[[Session[Any]], bytes]] = {
    "empty": lambda _: b"",
    "null": lambda _: b"null",
    "empty-object": lambda _: b"{}",
    "garbage": lambda _: b"\x80\xff\0",
    "truncated": _truncated,
    "another-format": MsgpackCodec[Any]().encode,
    "another-session": _swapped,
    "another-type": lambda session: JsonCodec[Any]().encode(
        msgspec.structs.replace(session, data=["no number"])
    ),
}
_unreadable = pytest.mark.parametrize(
    "spoil", [pytest.param(spoil, id=id) for id, spoil in _UNREADABLE.items()]
)


def everything_said(error: BaseException) -> Iterator[str]:
    """All the text of an error and of whatever it is chained to."""
    yield str(error)
    yield repr(error)
    yield from getattr(error, "__notes__", ())
    chained = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    if chained is not None:
        yield from everything_said(chained)
    if isinstance(error, BaseExceptionGroup):
        for one in error.exceptions:  # pyright: ignore[reportUnknownVariableType, reportUnknownMemberType] - a group of whatever
            yield from everything_said(one)  # pyright: ignore[reportUnknownArgumentType]


class Refusing(Harness):
    """Bad input, bad records, and errors."""

    @pytest.mark.parametrize("id", _BAD_IDS.values(), ids=_BAD_IDS)
    async def test_a_bad_id_cannot_be_stored(self, id: str) -> None:
        """Whatever is not 1 to 256 visible ASCII characters is `InvalidSession`, at any `When`."""
        storage = await self.open()
        session = Session[Any](id=id, data="something")

        for when in When:
            with unchanged(session), pytest.raises(InvalidSession):
                await storage.store(session, when=when)

    @pytest.mark.parametrize("id", _BAD_IDS.values(), ids=_BAD_IDS)
    async def test_a_bad_id_cannot_be_asked_for(self, id: str) -> None:
        """Such an id is a mistake of the client's, other than an unknown one."""
        storage = await self.open()

        with pytest.raises(InvalidSession):
            await storage.load(id)
        with pytest.raises(InvalidSession):
            await storage.delete(id)

    @pytest.mark.parametrize("fields", _UNSTORABLE.values(), ids=_UNSTORABLE)
    async def test_what_cannot_be_stored_is_not(self, fields: Callable[[], dict[str, Any]]) -> None:
        """Naive dates, unencodable and too large data: `InvalidSession`, and nothing is stored."""
        storage = await self.open(codec=JsonCodec(max_bytes=1_000))
        session = new_session(**fields())

        with unchanged(session), pytest.raises(InvalidSession):
            await storage.store(session)

        with pytest.raises(SessionNotFound):
            await storage.load(session.id)

    @pytest.mark.parametrize("fields", _UNSTORABLE.values(), ids=_UNSTORABLE)
    async def test_what_cannot_be_stored_overwrites_nothing(
        self, fields: Callable[[], dict[str, Any]]
    ) -> None:
        """The session that was there is still there, as it was."""
        storage = await self.open(codec=JsonCodec(max_bytes=1_000))
        stored = new_session(data="in order")
        await storage.store(stored)
        session = msgspec.structs.replace(stored, **fields())

        for when in When:
            with unchanged(session), pytest.raises((InvalidSession, SessionExists)):
                await storage.store(session, when=when)

        assert content(await storage.load(stored.id)) == content(stored)

    async def test_default_codecs_limit_the_size(self) -> None:
        """Without a codec of its own, a storage takes no more than a mebibyte or so."""
        storage = await self.open()
        session = new_session(data="x" * 2_000_000)

        with unchanged(session), pytest.raises(InvalidSession):
            await storage.store(session)

    async def _spoilt(
        self, spoil: Callable[[Session[Any]], bytes]
    ) -> tuple[Storage[Any], Session[Any]]:
        """A storage and a session in it that cannot be read; what is stored from now on can."""
        codec = SpoilingCodec(spoil, reader=JsonCodec(float))
        storage = await self.open(codec=codec)
        session = new_session(data=1.5)
        await storage.store(session)
        codec.spoil = None
        return storage, session

    @_unreadable
    async def test_an_unreadable_record_is_corrupt(
        self, spoil: Callable[[Session[Any]], bytes]
    ) -> None:
        """Never an empty session, never someone else's, and not "not found" either."""
        storage, session = await self._spoilt(spoil)

        for _ in range(2):
            with pytest.raises(CorruptSession):
                await storage.load(session.id)

    @_unreadable
    async def test_an_unreadable_record_can_be_overwritten(
        self, spoil: Callable[[Session[Any]], bytes]
    ) -> None:
        """`ALWAYS` means always."""
        storage, session = await self._spoilt(spoil)

        await storage.store(session)

        assert content(await storage.load(session.id)) == content(session)

    @_unreadable
    async def test_an_unreadable_record_can_be_deleted(
        self, spoil: Callable[[Session[Any]], bytes]
    ) -> None:
        """It is there, so `delete` says True."""
        storage, session = await self._spoilt(spoil)

        assert await storage.delete(session.id) is True
        with pytest.raises(SessionNotFound):
            await storage.load(session.id)

    @_unreadable
    async def test_an_unreadable_record_is_not_absent(
        self, spoil: Callable[[Session[Any]], bytes]
    ) -> None:
        """`ABSENT` does not write over it, whether the storage reads it or only sees it."""
        storage, session = await self._spoilt(spoil)

        with unchanged(session), pytest.raises((SessionExists, CorruptSession)):
            await storage.store(session, when=When.ABSENT)

        with pytest.raises(CorruptSession):
            await storage.load(session.id)

    async def test_a_codec_has_the_last_word_on_what_it_reads(self) -> None:
        """`CorruptSession` and `InvalidSession` that a codec raises reach the caller."""
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

    async def _provoke(self, hint: str) -> list[Exception]:
        """The errors of every mistake that one can make with any storage.

        `hint` stands in every field of every session involved. Whether each mistake is an error is
        for other tests to say.
        """
        errors: list[Exception] = []

        async def provoke(verb: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
            try:
                await verb(*args, **kwargs)
            except Exception as error:  # noqa: BLE001 - whichever it is, it must not tell
                errors.append(error)

        def secret(suffix: str = "", **fields: Any) -> Session[Any]:
            given: dict[str, Any] = {"metadata": {hint: hint}, "data": {hint: hint}}
            id = f"{hint}{new_session_id()}{suffix}"
            return Session(id=id, principal=hint, **(given | fields))

        storage = await self.open()
        stored, stale, never = secret(), secret(), secret()
        await storage.store(stored)
        await storage.store(stale)
        await storage.store(await storage.load(stale.id))

        for verb in (storage.load, storage.delete):
            for suffix in (" ", "\n", "\xe9", "\ud800", "x" * 257):
                await provoke(verb, hint + suffix)
        for session in (
            secret("\xe9"),
            secret(data={hint: object()}),
            secret(data={hint: hint + "\ud800"}),
            secret(metadata={hint: hint + "\ud800"}),
            secret(data=hint * 300_000),
            secret(expires_at=_NAIVE),
        ):
            await provoke(storage.store, session)
        await provoke(storage.load, never.id)
        await provoke(storage.store, never, when=When.PRESENT)
        await provoke(storage.store, never, when=When.UNCHANGED)
        await provoke(storage.store, stored, when=When.ABSENT)
        await provoke(storage.store, stale, when=When.UNCHANGED)
        for spoil in (
            *_UNREADABLE.values(),
            lambda _: hint.encode(),
            lambda session: msgspec.json.encode({"id": session.id, "metadata": {hint: [hint]}}),
            lambda session: msgspec.json.encode({"id": session.id, "created_at": hint}),
        ):
            reader = await self.open(codec=SpoilingCodec(spoil, reader=JsonCodec(float)))
            unreadable = secret()
            await reader.store(unreadable)
            await provoke(reader.load, unreadable.id)
        await storage.aclose()
        await provoke(storage.load, stored.id)
        await provoke(storage.store, stored)
        return errors

    async def test_errors_say_which_status_to_answer_with(self) -> None:
        """Each class has its HTTP status, and is what Python programs expect of such an error."""
        errors = await self._provoke("hint")

        for error in errors:
            assert isinstance(error, SessionError)
            assert [
                error.status == status and isinstance(error, base)
                for kind, status, base in _STATUS
                if isinstance(error, kind)
            ] == [True]

    async def test_errors_do_not_tell_secrets(self) -> None:
        """No id and no content in an error, in what it is chained to, or in a log."""
        hint = "hush" + new_session_id()

        errors = await self._provoke(hint)

        assert [text for error in errors for text in everything_said(error) if hint in text] == []

    async def test_logs_do_not_tell_secrets(self, caplog: pytest.LogCaptureFixture) -> None:
        """Whatever a storage logs, at any level, holds no id and no content."""
        caplog.set_level(logging.DEBUG)
        hint = "hush" + new_session_id()

        await self._provoke(hint)

        assert hint not in caplog.text

    async def test_storages_do_not_show_sessions(self) -> None:
        """The `repr` of a storage holds no id and no content."""
        storage = await self.open()
        session = new_session(data="hush", created_at=datetime.now(UTC))

        await storage.store(session)

        assert session.id not in repr(storage)
        assert "hush" not in repr(storage)
