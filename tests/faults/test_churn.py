"""A few hours of sign-ins leave few entries without a session. See churn.py."""

import pytest

from tests.faults.churn import Habits, main, simulate
from tests.support.servers import Server


@pytest.mark.parametrize("sign_out", [0.3, 0.9])
async def test_entries_are_few_per_live_session(valkey: Server, sign_out: float) -> None:
    """There are at most 1.5, where each user signs in every quarter of an hour."""
    valkey.flush()
    habits = Habits(principals=50, sessions=1_000, minutes=300, sign_out=sign_out)
    sizes = await simulate(valkey, habits)
    assert all(size.sessions > 50 for size in sizes)
    assert max(size.ratio for size in sizes[2:]) <= 1.5


def test_command_prints_the_ratio(capsys: pytest.CaptureFixture[str]) -> None:
    """The last line has the ratio at the end."""
    assert main(["--principals", "5", "--sessions", "50", "--minutes", "60"]) == 0
    *hours, last = capsys.readouterr().out.splitlines()
    assert len(hours) == 1
    assert last.startswith("most: ")
