"""Storages that are broken on purpose must fail the contract: each for what is wrong with it.

So a contract test that cannot fail, or that fails for somebody else's mistake, is found out here.
"""

from typing import Any, ClassVar

import pytest

from aiosessions import Codec, JsonCodec
from aiosessions.testing import (
    FakeTime,
    RemoteStorageContract,
    SharedStorageContract,
    StorageFactory,
    SweptStorageContract,
)
from tests import broken_storages as broken
from tests.honest_storage import Backend, HonestStorage


class WholeContract(FakeTime, RemoteStorageContract, SharedStorageContract, SweptStorageContract):
    """The whole contract, over the storage that a subclass names."""

    storage: ClassVar[type[HonestStorage]]

    def factory(self, backend: Backend) -> StorageFactory:
        """Makes storages over a backend."""

        def make(*, ttl: float = 60.0, codec: Codec[Any] | None = None) -> HonestStorage:
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


class TestHonestStorage(WholeContract):
    """The storage that the broken ones are made from has no faults of its own."""

    storage = HonestStorage


class TestHonestStorageOnTrio(TestHonestStorage):
    """Nor on trio."""

    backend = "trio"


LEAKS = "closing_amid_verbs_leaks_nothing"

PLUGINS = ("anyio", "asyncio", "cacheprovider", "hypothesispytest", "unraisableexception")

# What the contract finds in each, and it finds nothing else. The names are those of its tests.
BROKEN: dict[type[HonestStorage], str] = {
    broken.LoadDoesNotRenew: """
        a_sweep_before_a_moment_removes_what_was_not_used_since
        load_renews_only_the_session_it_loads
        load_renews_the_ttl
        load_starts_a_full_ttl_and_no_more
        no_load_carries_a_session_past_its_deadline
        sweeping_before_a_moment_spares_what_was_used_since
        use_on_one_replica_counts_on_all
    """,
    broken.LoadRenewsPastTheDeadline: """
        a_session_ends_at_its_deadline
        no_load_carries_a_session_past_its_deadline
    """,
    broken.StoreKeepsTheAge: """
        a_sweep_before_a_moment_removes_what_was_not_used_since
        store_starts_a_full_ttl
        use_on_one_replica_counts_on_all
    """,
    broken.RefusedWritesRenew: "a_refused_write_is_no_use",
    broken.CountsInSeconds: """
        a_session_ends_when_idle_for_its_ttl
        a_sweep_before_a_moment_removes_what_was_not_used_since
        load_starts_a_full_ttl_and_no_more
        store_starts_a_full_ttl
        what_was_swept_up_is_deleted
    """,
    broken.EndsTooLate: """
        a_far_deadline_leaves_the_ttl_alone
        a_refused_write_is_no_use
        a_session_ends_when_idle_for_its_ttl
        a_sweep_counts_what_it_removes
        an_ended_session_stays_ended
        delete_of_an_absent_session_is_false
        load_renews_only_the_session_it_loads
        load_starts_a_full_ttl_and_no_more
        store_starts_a_full_ttl
        sweeping_makes_no_difference_to_the_dead
        sweeping_makes_no_difference_to_the_living
        where_there_is_none_a_write_creates
        where_there_is_none_a_write_that_needs_one_is_not_found
    """,
    broken.GuessesTimeZones: "sweeping_before_a_naive_moment_is_refused",
    broken.HandsOutOneObject: """
        every_load_is_a_copy_of_its_own
        of_many_unchanged_writes_one_wins
    """,
    broken.KeepsTheCallersObject: """
        absent_refuses_where_there_is_one
        what_is_stored_is_a_copy
    """,
    broken.PresentResurrects: """
        no_save_outlives_a_delete
        replicas_see_each_others_deletes
        where_there_is_none_a_write_that_needs_one_is_not_found
    """,
    broken.AbsentOverwrites: """
        a_refused_write_is_no_use
        absent_refuses_where_there_is_one
        an_unreadable_record_is_not_absent
        of_many_creators_one_wins
    """,
    broken.AbsentCollidesWithTheDead: "where_there_is_none_a_write_creates",
    broken.UnchangedIgnoresTheRevision: """
        a_refused_write_is_no_use
        concurrent_increments_all_count
        of_many_unchanged_writes_one_wins
        replicas_see_each_others_writes
        unchanged_compares_revisions_not_content
        unchanged_refuses_an_object_that_was_never_stored
        unchanged_refuses_what_was_created_anew
        unchanged_refuses_what_was_rewritten
    """,
    broken.ChecksThenWrites: """
        concurrent_increments_all_count
        no_save_outlives_a_delete
        of_many_creators_one_wins
        of_many_unchanged_writes_one_wins
    """,
    broken.RevisionIsAHash: """
        loading_keeps_the_revision
        revisions_never_repeat
        store_stamps_a_fresh_revision
        unchanged_compares_revisions_not_content
    """,
    broken.RevisionStaysInTheStorage: """
        a_cancelled_store_is_whole_or_not_at_all
        a_deadline_can_be_brought_forward
        a_deadline_can_be_put_off
        a_sweep_before_a_moment_removes_what_was_not_used_since
        closing_one_replica_leaves_the_others
        defaults_come_back
        every_field_comes_back
        loading_keeps_the_revision
        loads_see_whole_writes
        no_store_carries_a_session_past_its_deadline
        replicas_see_each_others_writes
        revisions_never_repeat
        store_changes_only_the_revision
        store_stamps_a_fresh_revision
        store_starts_a_full_ttl
        use_on_one_replica_counts_on_all
        what_is_stored_past_its_deadline_is_absent_at_once
        where_there_is_one_a_write_overwrites
    """,
    broken.StampsTheDate: """
        dates_come_back_in_utc
        defaults_come_back
        every_field_comes_back
        store_changes_only_the_revision
    """,
    broken.StampsBeforeItChecks: """
        absent_refuses_where_there_is_one
        an_unreadable_record_is_not_absent
        no_store_succeeds_in_an_outage
        replicas_see_each_others_deletes
        replicas_see_each_others_writes
        unchanged_compares_revisions_not_content
        unchanged_refuses_an_object_that_was_never_stored
        unchanged_refuses_what_was_created_anew
        unchanged_refuses_what_was_rewritten
        what_was_swept_up_is_deleted
        where_there_is_none_a_write_that_needs_one_is_not_found
    """,
    broken.DeleteIsAlwaysTrue: """
        delete_of_an_absent_session_is_false
        delete_says_whether_there_was_one
        of_many_deletes_one_finds_the_session
        replicas_see_each_others_deletes
        sweeping_makes_no_difference_to_the_dead
        what_is_stored_past_its_deadline_is_absent_at_once
    """,
    broken.DeleteLooksFirst: "of_many_deletes_one_finds_the_session",
    broken.TrustsWhatItFinds: """
        an_unreadable_record_is_corrupt
        an_unreadable_record_is_not_absent
    """,
    broken.ForgivesCorruption: """
        a_codec_has_the_last_word_on_what_it_reads
        an_unreadable_record_is_corrupt
        an_unreadable_record_is_not_absent
    """,
    broken.ForgetsCorruption: """
        a_codec_has_the_last_word_on_what_it_reads
        an_unreadable_record_is_corrupt
        an_unreadable_record_is_not_absent
    """,
    broken.OutageIsNotFound: """
        a_storage_closes_in_an_outage
        an_outage_does_not_tell_secrets
        an_outage_is_not_an_absent_session
        no_store_succeeds_in_an_outage
    """,
    broken.TellsTheId: "errors_do_not_tell_secrets",
    broken.LogsTheId: "logs_do_not_tell_secrets",
    broken.ShowsEverything: "storages_do_not_show_sessions",
    broken.NeverCloses: """
        a_closed_storage_refuses_every_verb
        a_storage_that_was_never_used_closes_too
        closing_twice_is_fine
        leaving_the_context_closes
    """,
    broken.ClosesOnce: """
        a_closed_storage_refuses_every_verb
        a_storage_closes_in_an_outage
        a_storage_that_was_never_used_closes_too
        closing_amid_verbs_ends_them_all
        closing_amid_verbs_leaks_nothing
        closing_leaves_no_task_behind
        closing_one_replica_leaves_the_others
        closing_twice_is_fine
        errors_do_not_tell_secrets
        errors_say_which_status_to_answer_with
        leaving_the_context_closes
        logs_do_not_tell_secrets
    """,
    broken.LeavesATaskBehind: "closing_leaves_no_task_behind",
    broken.WritesInTwoSteps: """
        a_cancelled_store_is_whole_or_not_at_all
        concurrent_increments_all_count
        loads_see_whole_writes
    """,
    broken.RemembersWhatItLoaded: """
        concurrent_increments_all_count
        replicas_see_each_others_writes
    """,
    broken.BorrowsAndCloses: "closing_one_replica_leaves_the_others",
    broken.EndsWhenSwept: """
        a_deadline_can_be_brought_forward
        a_far_deadline_leaves_the_ttl_alone
        a_refused_write_is_no_use
        a_session_ends_at_its_deadline
        a_session_ends_when_idle_for_its_ttl
        an_ended_session_stays_ended
        delete_of_an_absent_session_is_false
        load_renews_only_the_session_it_loads
        load_starts_a_full_ttl_and_no_more
        no_load_carries_a_session_past_its_deadline
        no_store_carries_a_session_past_its_deadline
        store_starts_a_full_ttl
        sweeping_makes_no_difference_to_the_living
        what_is_stored_past_its_deadline_is_absent_at_once
        where_there_is_none_a_write_creates
        where_there_is_none_a_write_that_needs_one_is_not_found
    """,
    broken.SweepsTheLiving: "sweeping_makes_no_difference_to_the_living",
    broken.SweepMissesDeadlines: "a_sweep_counts_what_it_removes",
    broken.SweepOnlyCounts: """
        a_second_sweep_finds_nothing
        a_sweep_before_a_moment_removes_what_was_not_used_since
        a_sweep_counts_what_it_removes
        what_was_swept_up_is_deleted
    """,
    broken.TakesAnyId: """
        a_bad_id_cannot_be_asked_for
        a_bad_id_cannot_be_stored
    """,
    broken.TakesIdsForPatterns: "every_valid_id_works",
    broken.FoldsCase: "ids_match_exactly",
    broken.DeleteFindsTheDead: """
        delete_of_an_absent_session_is_false
        what_is_stored_past_its_deadline_is_absent_at_once
    """,
    broken.DeletesEverything: """
        a_cancelled_verb_leaves_the_storage_in_order
        writing_one_session_leaves_the_others
    """,
    broken.ReadsBeforeItWrites: """
        an_unreadable_record_can_be_deleted
        an_unreadable_record_can_be_overwritten
    """,
    broken.RepliesGetOutOfStep: """
        a_cancelled_verb_leaves_the_storage_in_order
        cancelling_a_caller_cancels_that_caller_only
    """,
    broken.RepliesComeBackwards: """
        cancelling_a_caller_cancels_that_caller_only
        concurrent_callers_get_their_own_sessions
    """,
    broken.TakesEmptyForNone: "data_comes_back_as_it_was",
    broken.IgnoresTheCodec: """
        a_codec_has_the_last_word_on_what_it_reads
        an_unreadable_record_is_corrupt
        an_unreadable_record_is_not_absent
        typed_data_comes_back_typed
        what_cannot_be_stored_is_not
        what_cannot_be_stored_overwrites_nothing
    """,
    broken.HasNoLimits: """
        default_codecs_limit_the_size
        what_cannot_be_stored_is_not
        what_cannot_be_stored_overwrites_nothing
    """,
    broken.Merges: "overwriting_replaces_the_whole_session",
    broken.PresentComparesRevisions: "unconditional_writes_ignore_the_revision",
    broken.MakesUpTheUnknown: """
        a_storage_closes_in_an_outage
        an_outage_does_not_tell_secrets
        an_outage_is_not_an_absent_session
        load_of_an_unknown_id_is_not_found
        sweeping_makes_no_difference_to_the_dead
        what_cannot_be_stored_is_not
        where_there_is_none_a_write_that_needs_one_is_not_found
    """,
    broken.StoresWhatItCan: """
        what_cannot_be_stored_is_not
        what_cannot_be_stored_overwrites_nothing
    """,
}


class Failures:
    """A plugin that notes which tests failed, and nothing else: no tracebacks, no storages."""

    def __init__(self) -> None:
        self.found: dict[str, set[str]] = {}
        self.skipped = 0

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note what failed."""
        self.skipped += report.skipped
        if report.failed:
            _, storage, test = report.nodeid.split("::")
            tests = self.found.setdefault(storage.removeprefix("Test"), set())
            tests.add(test.partition("[")[0].removeprefix("test_"))


def failures(pytester: pytest.Pytester, storages: str, only: str = "") -> dict[str, set[str]]:
    """Run the contract over storages, given as an expression; what failed, by storage."""
    file = pytester.makepyfile(
        f"""
        from {__name__} import BROKEN, WholeContract, broken

        for storage in {storages}:
            name = f"Test{{storage.__name__}}"
            globals()[name] = type(name, (WholeContract,), {{"storage": storage}})
        """
    )
    # Not `pytester.inline_run`, which keeps every call of every hook, and all that these refer to.
    noted = Failures()
    quickly = ("-q", "--tb=no", "--import-mode=importlib", *(f"-pno:{name}" for name in PLUGINS))
    pytest.main([str(file), "-Werror", f"-k={only}", *quickly], plugins=[noted])
    assert noted.skipped == 0
    return noted.found


def test_broken_storages_fail_for_what_is_wrong_with_them(pytester: pytest.Pytester) -> None:
    """Exactly the tests of the promises that are broken fail; and there is no test that cannot."""
    found = failures(pytester, "BROKEN")

    assert found == {storage.__name__: set(tests.split()) for storage, tests in BROKEN.items()}
    everything = {name.removeprefix("test_") for name in dir(WholeContract) if "test_" in name}
    assert set.union(*found.values()) == everything


def test_a_leak_is_found(pytester: pytest.Pytester) -> None:
    """By the one test that is about leaks; in any other the socket would be left to later tests."""
    assert failures(pytester, "[broken.LeaksItsConnection]", LEAKS) == {
        "LeaksItsConnection": {LEAKS}
    }


def test_every_broken_storage_is_tried() -> None:
    """None is left out of the table above."""
    assert {*BROKEN, broken.LeaksItsConnection} == {
        storage
        for storage in vars(broken).values()
        if isinstance(storage, type)
        and issubclass(storage, HonestStorage)
        and storage is not HonestStorage
    }
