"""Storages with one mistake each in the lists of a principal's sessions."""
# ruff: noqa: D102 - each class explains its methods

import fnmatch
import logging
from builtins import list as List  # noqa: N812 - the classes have a method of this name
from collections.abc import Iterable
from typing import Any, ClassVar

import msgspec
from anyio.lowlevel import checkpoint

from aiosessions import Session, SessionInfo, When, session_digest
from aiosessions.record import read_info
from tests.contract.broken_storages import Broken
from tests.support.indexes import IndexedReferenceStorage, Owned
from tests.support.storages import Entry


class ListsItsOwnWrites(
    IndexedReferenceStorage,
    Broken,
    found_by="stored_session_is_listed session_in_use_stays_listed",
):
    """Each replica has a separate index, which only its stores fill."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.written: set[str] = set()

    def write(self, id: str, entry: Entry, when: When) -> None:
        super().write(id, entry, when)
        self.written.add(session_digest(id))

    def owned(self, principal: str) -> Owned:
        owned = super().owned(principal).items()
        return {digest: entry for digest, entry in owned if digest in self.written}


class IndexExpires(IndexedReferenceStorage, Broken, found_by="session_in_use_stays_listed"):
    """An entry lasts for three TTLs after the session was created; nothing extends it."""

    entered: ClassVar[dict[str, int]] = {}

    def write(self, id: str, entry: Entry, when: When) -> None:
        super().write(id, entry, when)
        self.entered.setdefault(session_digest(id), self.now())

    def owned(self, principal: str) -> Owned:
        owned = super().owned(principal).items()
        since = self.now() - 3 * self.ttl
        return {digest: entry for digest, entry in owned if self.entered[digest] > since}


class ListsAPart(IndexedReferenceStorage, Broken, found_by="listed_session_has_every_field"):
    """The list leaves out the metadata."""

    def infos(self, principal: str) -> Iterable[SessionInfo[Any]]:
        for info in super().infos(principal):
            yield msgspec.structs.replace(info, metadata={})


class LooseInfo(SessionInfo[Any], kw_only=True, frozen=True):
    """An entry of a list that shows its content."""

    def __repr__(self) -> str:
        return f"LooseInfo(data={self.data!r})"


class ListsLooseInfos(IndexedReferenceStorage, Broken, found_by="listed_session_holds_no_id"):
    """The repr of an entry shows the data."""

    def infos(self, principal: str) -> Iterable[SessionInfo[Any]]:
        for info in super().infos(principal):
            yield LooseInfo(**msgspec.structs.asdict(info))


class ListsInTheOrderOfWrites(
    IndexedReferenceStorage, Broken, found_by="latest_update_is_listed_first"
):
    """The list is not sorted by the dates of the sessions."""

    async def list(self, principal: str) -> List[SessionInfo[Any]]:
        self.check_open()
        return List(self.infos(principal))


class EncodesPrincipals(
    IndexedReferenceStorage, Broken, found_by="unknown_principal_has_no_sessions"
):
    """A principal that is not valid Unicode raises."""

    def owned(self, principal: str) -> Owned:
        principal.encode()
        return super().owned(principal)


class PrincipalsArePatterns(IndexedReferenceStorage, Broken, found_by="principals_do_not_mix"):
    """A look-up matches patterns, as with SCAN."""

    def owned(self, principal: str) -> Owned:
        return {
            digest: entry
            for digest, entry in self.everyone().items()
            if fnmatch.fnmatchcase(self.codec.decode(entry.record[79:]).principal or "", principal)
        }

    def everyone(self) -> Owned:
        """Return every session with a principal."""
        found = self.table().items()
        return {session_digest(id): entry for id, entry in found if entry.record[:1] != b"1"}


class ListRenews(IndexedReferenceStorage, Broken, found_by="listing_renews_nothing"):
    """A list counts as use."""

    def infos(self, principal: str) -> Iterable[SessionInfo[Any]]:
        for entry in self.owned(principal).values():
            self.renew(entry)
        return super().infos(principal)


class ListsTheDead(
    IndexedReferenceStorage,
    Broken,
    found_by="""
        absent_session_is_not_listed
        session_is_listed_until_its_deadline
        expired_sessions_do_not_hide_new_ones
        absent_session_is_not_revoked
    """,
):
    """The list has every session that was not swept."""

    def owned(self, principal: str) -> Owned:
        found = self.table().items()
        return {session_digest(id): each for id, each in found if self.is_owned(each, principal)}


class KeepsTheFirstOwner(
    IndexedReferenceStorage,
    Broken,
    found_by="recreated_session_has_the_new_owner overwritten_session_has_the_new_owner",
):
    """An entry stays in the list of the principal that created the session."""

    owners: ClassVar[dict[str, Entry]] = {}

    def write(self, id: str, entry: Entry, when: When) -> None:
        super().write(id, entry, when)
        self.owners.setdefault(session_digest(id), entry)

    def owned(self, principal: str) -> Owned:
        return {
            session_digest(id): entry
            for id, entry in self.table().items()
            if self.is_owned(self.owners[session_digest(id)], principal)
        }


class SharesListedObjects(IndexedReferenceStorage, Broken, found_by="listed_session_is_a_copy"):
    """Every list returns the same objects."""

    shared: ClassVar[dict[str, SessionInfo[Any]]] = {}

    def infos(self, principal: str) -> Iterable[SessionInfo[Any]]:
        return [self.shared.setdefault(info.digest, info) for info in super().infos(principal)]


class EncodesTheId(IndexedReferenceStorage, Broken, found_by="codec_sees_no_id"):
    """A store measures a session with its codec before it takes the id out."""

    async def store(self, session: Session[Any], *, when: When = When.ALWAYS) -> None:
        self.codec.encode(session)
        await super().store(session, when=when)


class OneUnreadableRecordStopsAList(
    IndexedReferenceStorage,
    Broken,
    found_by="unreadable_session_is_not_listed unreadable_session_stops_no_revocation",
):
    """An unreadable record raises, before anything is removed."""

    def infos(self, principal: str) -> Iterable[SessionInfo[Any]]:
        for digest, entry in self.current(principal).items():
            yield read_info(entry.record, digest, self.codec)

    async def revoke_all(self, principal: str, *, keep: str | None = None) -> int:
        await self.list(principal)
        return await super().revoke_all(principal, keep=keep)


class LogsUnreadableRecords(
    IndexedReferenceStorage, Broken, found_by="unreadable_session_is_not_listed"
):
    """A warning has the principal."""

    def infos(self, principal: str) -> Iterable[SessionInfo[Any]]:
        logging.getLogger(__name__).warning("%s has unreadable sessions", principal)
        return super().infos(principal)


class AcceptsAnyPrincipal(
    IndexedReferenceStorage, Broken, found_by="principal_that_is_not_a_string_is_refused"
):
    """A principal is converted to text."""

    def owned(self, principal: Any) -> Owned:
        return super().owned(str(principal))


class IndexNeverCloses(IndexedReferenceStorage, Broken, found_by="closed_index_refuses_every_verb"):
    """The index can be used after `aclose`."""

    def check_open(self) -> None:
        """Do nothing."""


class ListsInSteps(IndexedReferenceStorage, Broken, found_by="list_is_right_during_writes"):
    """A session that is written between the looks at the index and at the record is left out."""

    async def list(self, principal: str) -> List[SessionInfo[Any]]:
        before = {entry.revision for entry in self.owned(principal).values()}
        await checkpoint()
        after = self.owned(principal)
        infos = await super().list(principal)
        return [info for info in infos if after[info.digest].revision in before]


class EntersAfterTheRecord(
    IndexedReferenceStorage, Broken, found_by="cancelled_store_leaves_no_unlisted_session"
):
    """The session is written first, and its entry a turn later."""

    entered: ClassVar[set[str]] = set()

    async def store(self, session: Session[Any], *, when: When = When.ALWAYS) -> None:
        await super().store(session, when=when)
        await checkpoint()
        self.entered.add(session.digest)

    def owned(self, principal: str) -> Owned:
        owned = super().owned(principal).items()
        return {digest: entry for digest, entry in owned if digest in self.entered}


class ListsRotatedIds(
    IndexedReferenceStorage,
    Broken,
    found_by="rotated_session_is_revoked_unlisted rotation_keeps_one_session_listed",
):
    """A rotated session is listed under both ids."""

    def current(self, principal: str) -> Owned:
        return self.owned(principal)
