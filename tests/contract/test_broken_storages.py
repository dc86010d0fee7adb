"""The contract finds the mistake of each broken storage, and each of its tests finds one."""

import inspect
from typing import Any, ClassVar

import pytest

from aiosessions import Codec, JsonCodec
from aiosessions.testing import (
    FakeTime,
    RemoteStorageContract,
    SelfExpiringStorageContract,
    SharedStorageContract,
    StorageFactory,
    SweptStorageContract,
)
from tests.support import broken_storages as broken
from tests.support.storages import Backend, ReferenceStorage

PLUGINS = ("anyio", "asyncio", "cacheprovider", "hypothesispytest", "unraisableexception")


class ReferenceContract(
    FakeTime, RemoteStorageContract, SharedStorageContract, SweptStorageContract
):
    """The contracts that `ReferenceStorage` keeps, over the storage that a subclass names."""

    storage: ClassVar[type[ReferenceStorage]]

    def factory(self, backend: Backend) -> StorageFactory:
        """Return a factory of storages over a backend."""

        def make(*, ttl: float = 60.0, codec: Codec[Any] | None = None) -> ReferenceStorage:
            return self.storage(backend, ttl, codec or JsonCodec(), self.clock)

        return make

    @pytest.fixture
    def make_storage(self) -> StorageFactory:
        """Storages over an empty backend."""
        return self.factory(Backend())

    @pytest.fixture
    def make_unreachable_storage(self) -> StorageFactory:
        """Storages over a backend that is down."""
        return self.factory(Backend(is_down=True))


class EveryContract(ReferenceContract, SelfExpiringStorageContract):
    """Every test of the kit."""


class TestReferenceStorage(ReferenceContract):
    """`ReferenceStorage` keeps the contract, so a failure of a broken storage is its mistake."""

    storage = ReferenceStorage


class TestReferenceStorageOnTrio(TestReferenceStorage):
    """The same on trio."""

    backend = "trio"


# The tests that must find the mistake of each storage, without "test_".
FOUND_BY: dict[type[ReferenceStorage], str] = {
    broken.LoadDoesNotRenew: """
        load_starts_a_full_ttl
        use_on_one_replica_counts_on_all
        sweep_before_a_moment_keeps_sessions_used_since
        sweep_before_a_moment_removes_unused_sessions
    """,
    broken.LoadRenewsTheDeadline: "load_keeps_the_deadline",
    broken.LoadRenewsUnreadableRecords: "load_does_not_prolong_unreadable_records",
    broken.StoreKeepsTheAge: "store_starts_a_full_ttl",
    broken.StorePastTheDeadlineDoesNothing: "store_past_the_deadline_removes",
    broken.StorePastTheDeadlineKeepsARecord: "store_past_the_deadline_leaves_nothing_to_sweep",
    broken.RefusedWritesRenew: "refused_write_does_not_renew",
    broken.AbsentForgetsTheTtl: """
        store_starts_a_full_ttl
        far_deadline_leaves_the_ttl_alone
    """,
    broken.AbsentForgetsTheDeadline: """
        session_expires_at_its_deadline
        load_keeps_the_deadline
    """,
    broken.AbsentIsNeverRenewed: """
        load_starts_a_full_ttl
        load_renews_only_the_loaded_session
    """,
    broken.AbsentInheritsTheAge: "recreated_session_has_a_full_ttl",
    broken.CountsInSeconds: """
        store_starts_a_full_ttl
        load_starts_a_full_ttl
    """,
    broken.ExpiresTooLate: """
        store_starts_a_full_ttl
        load_starts_a_full_ttl
    """,
    broken.GuessesTimeZones: "sweep_before_a_naive_moment_is_refused",
    broken.SharesLoadedObjects: "each_load_returns_a_copy",
    broken.KeepsTheCallersObject: "store_keeps_a_copy",
    broken.PresentCreates: """
        absent_session_cannot_be_overwritten
        no_save_outlives_a_delete
    """,
    broken.PresentComparesRevisions: "unconditional_writes_ignore_the_revision",
    broken.AbsentOverwrites: """
        absent_refuses_a_present_session
        unreadable_record_is_not_absent
    """,
    broken.AbsentSeesExpiredSessions: "absent_session_can_be_created",
    broken.UnchangedIgnoresTheRevision: """
        unchanged_refuses_a_rewritten_session
        unchanged_refuses_a_recreated_session
        unchanged_refuses_an_unstored_object
    """,
    broken.YieldsBeforeTheWrite: """
        one_of_many_unchanged_writes_wins
        one_of_many_creators_wins
        concurrent_increments_all_count
    """,
    broken.RevisionIsAHash: """
        revisions_never_repeat
        unchanged_compares_revisions_not_content
    """,
    broken.RevisionIsNotStamped: """
        store_stamps_a_fresh_revision
        load_keeps_the_revision
        present_session_can_be_overwritten
        deadline_can_be_put_off
    """,
    broken.StampsTheDate: """
        store_changes_only_the_revision
        defaults_come_back
        every_field_comes_back
        dates_come_back_in_utc
    """,
    broken.StampsBeforeTheCheck: """
        absent_refuses_a_present_session
        store_fails_in_an_outage
    """,
    broken.DeleteIsAlwaysTrue: "delete_returns_whether_it_removed_a_session",
    broken.DeleteYields: "one_of_many_deletes_finds_the_session",
    broken.DeleteFindsExpiredSessions: "delete_of_an_absent_session_returns_false",
    broken.DeletesEverything: "writes_leave_other_sessions_alone",
    broken.ReturnsAnotherSession: "unreadable_record_is_corrupt",
    broken.UnreadableIsEmpty: "unreadable_record_is_corrupt",
    broken.UnreadableIsNotFound: "unreadable_record_is_corrupt",
    broken.EveryVerbDecodes: """
        unreadable_record_can_be_overwritten
        unreadable_record_can_be_deleted
    """,
    broken.OutageIsNotFound: """
        outage_is_not_an_absent_session
        store_fails_in_an_outage
        outage_errors_hold_no_secrets
    """,
    broken.LoadsAreInDoubt: "only_writes_are_in_doubt",
    broken.RaisesAnErrorOfItsOwn: "errors_have_a_status",
    broken.ErrorsHoldTheId: "errors_hold_no_secrets",
    broken.LogsHoldTheId: "logs_hold_no_secrets",
    broken.ReprHoldsSessions: "repr_holds_no_sessions",
    broken.NeverCloses: """
        closed_storage_refuses_every_verb
        unused_storage_can_be_closed
        leaving_the_context_closes
    """,
    broken.ClosesOnce: """
        closing_twice_is_fine
        storage_closes_in_an_outage
    """,
    broken.ClosingBreaksLoads: "closing_ends_verbs_in_flight",
    broken.LeavesATaskBehind: "closing_leaves_no_task_behind",
    broken.LeaksItsConnection: "closing_during_verbs_leaks_nothing",
    broken.WritesInTwoSteps: """
        loads_see_whole_writes
        cancelled_store_writes_all_or_nothing
    """,
    broken.CachesForEver: "replicas_see_each_others_writes",
    broken.SeesOnlyItsOwnSessions: """
        replicas_see_each_others_writes
        replicas_see_each_others_deletes
    """,
    broken.ClosesTheBackend: "closing_one_replica_leaves_the_others",
    broken.ExpiresWhenSwept: """
        expired_session_stays_expired
        session_expires_at_its_deadline
        store_keeps_the_deadline
        deadline_can_be_brought_forward
    """,
    broken.SweepsLiveSessions: """
        sweep_leaves_live_sessions_alone
        sweep_does_nothing
    """,
    broken.SweepIgnoresDeadlines: "sweep_counts_removed_sessions",
    broken.SweepRevives: "sweep_keeps_absent_sessions_absent",
    broken.SweepOnlyCounts: """
        second_sweep_removes_nothing
        swept_session_is_deleted
    """,
    broken.AcceptsAnyId: """
        malformed_id_cannot_be_stored
        malformed_id_cannot_be_looked_up
        id_that_is_not_a_string_is_a_type_error
    """,
    broken.MalformedIdIsInvalidSession: """
        malformed_id_cannot_be_stored
        malformed_id_cannot_be_looked_up
    """,
    broken.IdsArePatterns: "every_valid_id_works",
    broken.IdsIgnoreCase: "ids_match_exactly",
    broken.RepliesGetOutOfStep: """
        cancelled_verb_mixes_up_no_replies
        cancelling_a_caller_cancels_that_caller_only
    """,
    broken.RepliesComeBackwards: "concurrent_callers_get_their_own_sessions",
    broken.EmptyDataIsNone: "data_comes_back_unchanged",
    broken.IgnoresTheCodec: """
        typed_data_comes_back_typed
        errors_of_a_codec_reach_the_caller
    """,
    broken.HasNoSizeLimit: "default_codec_limits_the_size",
    broken.Merges: "overwriting_replaces_every_field",
    broken.UnknownIsEmpty: "load_of_an_unknown_id_is_not_found",
    broken.StoresAPart: """
        unstorable_session_is_not_stored
        unstorable_session_overwrites_nothing
    """,
}


class Selection:
    """A pytest plugin that runs selected tests only, and collects the failed ones.

    Args:
        tests: The names of the tests to run, by class.
    """

    def __init__(self, tests: dict[str, set[str]]) -> None:
        self.tests = tests
        self.failed: dict[str, set[str]] = {}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Keep the selected tests."""
        items[:] = [item for item in items if self._is_selected(item.nodeid)]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Collect a failed test."""
        if report.failed:
            storage, test = _parts(report.nodeid)
            self.failed.setdefault(storage, set()).add(test)

    def _is_selected(self, nodeid: str) -> bool:
        storage, test = _parts(nodeid)
        return test in self.tests[storage]


def _parts(nodeid: str) -> tuple[str, str]:
    """Split the id of a test into the names of its storage and of its function."""
    _, storage, test = nodeid.split("::")
    return storage.removeprefix("Test"), test.partition("[")[0].removeprefix("test_")


def test_contract_finds_every_mistake(pytester: pytest.Pytester) -> None:
    """Each broken storage fails the tests that are about its mistake."""
    expected = {storage.__name__: set(tests.split()) for storage, tests in FOUND_BY.items()}
    file = pytester.makepyfile(
        f"""
        from {__name__} import FOUND_BY, EveryContract

        for storage in FOUND_BY:
            name = f"Test{{storage.__name__}}"
            globals()[name] = type(name, (EveryContract,), {{"storage": storage}})
        """
    )
    selection = Selection(expected)
    # Not `pytester.inline_run`, which keeps the arguments of every call of every hook.
    options = ("-q", "--tb=no", "--no-summary", "--import-mode=importlib", "-Werror")
    pytest.main([str(file), *options, *(f"-pno:{name}" for name in PLUGINS)], plugins=[selection])

    assert selection.failed == expected


def test_every_contract_test_finds_a_mistake() -> None:
    """Each test of the kit is in the table, so none of them always passes."""
    everything = {name.removeprefix("test_") for name in dir(EveryContract) if "test_" in name}

    assert {test for tests in FOUND_BY.values() for test in tests.split()} == everything


def test_every_broken_storage_is_tried() -> None:
    """No broken storage is missing from the table."""
    storages = {value for value in vars(broken).values() if inspect.isclass(value)}

    assert set(FOUND_BY) == {each for each in storages if each.__module__ == broken.__name__}
