"""Storages with one mistake each in `revoke`, `revoke_all` or `trim`."""
# ruff: noqa: D102 - each class explains its methods

from builtins import list as List  # noqa: N812 - the classes have a method of this name
from typing import Any, ClassVar

from anyio.lowlevel import checkpoint

from aiosessions import Session, When, session_digest
from tests.contract.broken_storages import Broken
from tests.support.indexes import IndexedReferenceStorage, Owned


class RevokesForAnyone(IndexedReferenceStorage, Broken, found_by="revoke_checks_the_owner"):
    """`revoke` does not compare the principal."""

    async def revoke(self, principal: str, digest: str) -> bool:  # noqa: ARG002 - the mistake
        self.check_open()
        return self.remove([digest]) > 0


class RevokeIsAlwaysTrue(
    IndexedReferenceStorage,
    Broken,
    found_by="revoke_deletes_one_session absent_session_is_not_revoked",
):
    """`revoke` does not tell whether there was a session."""

    async def revoke(self, principal: str, digest: str) -> bool:
        await super().revoke(principal, digest)
        return True


class DigestsIgnoreCase(IndexedReferenceStorage, Broken, found_by="other_strings_revoke_nothing"):
    """`revoke` converts a digest to lower case."""

    async def revoke(self, principal: str, digest: str) -> bool:
        return await super().revoke(principal, digest.lower())


class AcceptsAnyDigest(
    IndexedReferenceStorage, Broken, found_by="digest_that_is_not_a_string_is_refused"
):
    """A digest is converted to text."""

    async def revoke(self, principal: str, digest: Any) -> bool:
        return await super().revoke(principal, str(digest))


class RevokesEveryone(IndexedReferenceStorage, Broken, found_by="revoke_all_deletes_every_session"):
    """`revoke_all` empties the backend."""

    async def revoke_all(self, principal: str, *, keep: str | None = None) -> int:
        count = await super().revoke_all(principal, keep=keep)
        if keep is None:
            self.table().clear()
        return count


class KeepIsADigest(
    IndexedReferenceStorage,
    Broken,
    found_by="revoke_all_keeps_the_given_session wrong_arguments_delete_nothing",
):
    """`revoke_all` and `trim` take a digest in place of an id."""

    async def revoke_all(self, principal: str, *, keep: str | None = None) -> int:
        self.check_open()
        return self.remove(each for each in self.owned(principal) if each != keep)


class RevokedSessionsComeBack(
    IndexedReferenceStorage,
    Broken,
    found_by="revoked_session_is_not_revived save_in_flight_does_not_survive",
):
    """A conditional write does not look for the session."""

    def check(self, session: Session[Any], when: When) -> None:
        if session.principal is None or when is When.ABSENT:
            super().check(session, when)


class RevokesInSteps(
    IndexedReferenceStorage,
    Broken,
    found_by="session_is_revoked_once rotation_in_flight_does_not_survive",
):
    """Other tasks run between the look at the index and the removals, and nothing looks again."""

    async def store(self, session: Session[Any], *, when: When = When.ALWAYS) -> None:
        await checkpoint()
        await super().store(session, when=when)

    async def revoke_all(self, principal: str, *, keep: str | None = None) -> int:
        digests = [each for each in self.owned(principal) if each != session_digest(keep or "-")]
        for _ in range(4):  # time for two writes of a rotation
            await checkpoint()
        self.remove(digests)
        return len(digests)


class DropsTheIndex(
    IndexedReferenceStorage, Broken, found_by="concurrently_created_session_is_revoked_or_listed"
):
    """`revoke_all` removes the whole index at its end, with the entries of new sessions."""

    hidden: ClassVar[set[str]] = set()

    async def revoke_all(self, principal: str, *, keep: str | None = None) -> int:
        count = await super().revoke_all(principal, keep=keep)
        await checkpoint()
        self.hidden.update(self.owned(principal))
        return count

    def owned(self, principal: str) -> Owned:
        owned = super().owned(principal).items()
        return {digest: entry for digest, entry in owned if digest not in self.hidden}


class DropsTheIndexFirst(DropsTheIndex, found_by="cancelled_revoke_all_can_be_repeated"):
    """A cancelled `revoke_all` leaves sessions without entries."""

    async def revoke_all(self, principal: str, *, keep: str | None = None) -> int:
        owned = [each for each in self.owned(principal) if each != session_digest(keep or "-")]
        self.hidden.update(owned)
        await checkpoint()
        return self.remove(owned)


class TrimsTheOldest(
    IndexedReferenceStorage,
    Broken,
    found_by="trim_deletes_the_longest_unused trim_keeps_the_given_session",
):
    """`trim` goes by the age of sessions, and keeps no particular one."""

    async def trim(self, principal: str, most: int, *, keep: str) -> int:  # noqa: ARG002 - as above
        self.check_open()
        current = List(self.current(principal))
        return self.remove(current[: max(0, len(current) - most)])
