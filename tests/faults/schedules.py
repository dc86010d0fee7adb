"""The schedules of `simulation`, drawn from seeds."""

import random
from typing import Any, Final, NamedTuple

from aiosessions.redis._commands import Template, getex
from aiosessions.redis._scripts import CONDITIONS, STORE, STORE_UNCHANGED
from aiosessions.storage import When

_ALWAYS: Final = CONDITIONS[When.ALWAYS]
_UNCHANGED: Final = CONDITIONS[When.UNCHANGED]
_WORDS: Final = (b"record", b"60000", b"0", b"1")
CALLS: Final[dict[str, tuple[Template, tuple[bytes, ...]]]] = {
    "load": (getex(60_000), ()),
    "load_asking": (getex(60_000), ()),
    "store": (STORE.plain, (_ALWAYS, *_WORDS)),
    "store_asking": (STORE.plain, (_ALWAYS, *_WORDS)),
    "compare_and_set": (STORE_UNCHANGED.plain, (_UNCHANGED, *_WORDS)),
}
_SHARES: Final = (1.0, 1.0, 1.0, 0.3)  # parts of the timeout; a verb may send several commands
# The steps: name, weight, arguments to choose from.
_Kind = tuple[str, float, tuple[Any, ...]]
_CALM: Final[tuple[_Kind, ...]] = (
    ("load", 5, _SHARES),
    ("store", 5, _SHARES),
    ("load_asking", 0.5, _SHARES),
    ("store_asking", 0.5, _SHARES),
    ("compare_and_set", 3, _SHARES),
    ("cancel", 4, (0, 0, 1, 2)),  # the caller, counted from the latest
    ("answer", 5, ("all",)),  # serve and deliver
    ("serve", 3, (1, 2, 5)),  # commands of the oldest socket that has any
    ("deliver", 3, (1, 6, 1000)),  # bytes of the oldest socket that has any
    ("wait", 4, (0.002, 0.002, 0.05, 0.4)),
    ("tick", 3, ("timer",)),  # wait for the next timer, but do not run it yet
    ("fill", 1, ("buffer",)),  # the latest socket takes no more bytes
    ("drain", 1, ("buffer",)),  # all sockets take bytes again
)
_FAULTS: Final[tuple[_Kind, ...]] = (
    ("wait", 2, (0.6, 1.1)),
    ("refuse", 2, ("READONLY", "LOADING", "OOM", "NOSCRIPT")),
    ("lose", 2, ("unread", "read")),  # whether the server still reads the commands sent
    ("stray", 1, (b">1\r\n+invalidate\r\n", b"\0\0\r\n", b"*0\r\n")),  # for no command
    ("mute", 1, ("socket",)),  # the server ignores the latest socket from now on
    ("pause", 1, (0.03, 0.5, 1.2)),  # the process, so that timers are late
    ("accept", 2, ("yes", "yes", "no", "never", "password")),  # attempts to connect
    ("stop", 0.5, ("task",)),  # cancel the task of the connection, as anyone may do
    ("close", 0.3, ("router",)),
)
HARMFUL: Final = {name for name, _, _ in _FAULTS} - {"wait", "refuse"}


class Step(NamedTuple):
    """A step, and the turns of the event loop after it. Its number is the key of a call."""

    number: int
    name: str
    argument: Any
    turns: int


class Schedule(NamedTuple):
    """Steps, and the seed of everything else that is random.

    Attributes:
        small: Whether the pipeline has room for a few commands only.
        heals: Whether the server answers everything after the last step.
    """

    seed: int
    small: bool
    heals: bool
    steps: tuple[Step, ...]

    def __str__(self) -> str:
        lines = (f"{each[0]:4}  {each[1]} {each[2]}, {each[3]} turns" for each in self.steps)
        return "\n".join((f"seed {self.seed}, small={self.small}, heals={self.heals}", *lines))


def draw(seed: int) -> Schedule:
    """The schedule of a seed. One of four is without faults."""
    rng = random.Random(seed)  # noqa: S311 - to be replayed
    kinds = _CALM if seed % 4 == 0 else _CALM + _FAULTS
    drawn = rng.choices(kinds, [weight for _, weight, _ in kinds], k=rng.randint(6, 22))
    steps = [
        Step(number, name, rng.choice(arguments), rng.choice((0, 0, 1, 1, 2, 4)))
        for number, (name, _, arguments) in enumerate(drawn)
    ]
    return Schedule(seed, rng.random() < 0.3, rng.random() < 0.7, tuple(steps))
