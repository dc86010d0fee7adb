"""Deterministic simulation: random schedules for a connection, in virtual time.

`python -m tests.faults.simulation --schedules 100000` runs the schedules of so many seeds.

A schedule is a list of steps: calls, cancellations, actions of the server, faults, and the passage
of time. The connection and the router are real. The event loop, the sockets and the server are
objects without I/O, so a schedule always gives the same events. The seed decides the orders that
asyncio leaves open: steps come in one turn of the event loop or in several.

The rules, checked in each schedule:

- A reply reaches the caller of its command, and no other.
- A caller ends within its timeout, and does not wait for an idle server.
- Cancelling a caller affects no other: without a fault, no call fails.
- An acknowledged write was applied exactly once. A write that failed with `in_doubt=False` was not
  applied. A load is never in doubt. Nothing is sent for a caller that has ended.
- When all callers have ended, nothing is queued or in flight, and the next call succeeds.
- After closing, no task, timer, future or socket remains.

A schedule that breaks a rule is reduced to a shorter one that breaks the same rule.
"""

import argparse
import asyncio
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from aiosessions import SessionError
from aiosessions.redis._routing import Router

from .schedules import CALLS, HARMFUL, Schedule, Step, draw
from .virtual import DriverConnection, Library, Loop, Server

_TIMEOUT: Final = 1.0
_NEVER: Final = float("inf")
# After a pause of the process, commands expire this much later, so that replies can be read first.
_GRACE: Final = 0.0101
_SERVER: Final = ("", 0)  # as the router names its only server


@dataclass
class Caller:
    """A call and its end."""

    number: int
    name: str
    task: "asyncio.Task[None]"
    deadline: float = _NEVER
    result: Any = None
    late: float = 0.0  # after the deadline, or after a pause of the process that ended later
    written: int = 0  # how often its command was written before its end
    cancelled: bool = False


class Simulation:
    """One run of a schedule.

    Attributes:
        problems: The broken rules, each with a colon and details.
        rule: The first broken rule; empty if there is none.
        server: The server, with the trace of events.
    """

    def __init__(self, schedule: Schedule, library: Library) -> None:
        library.outage["random"] = rng = random.Random(schedule.seed)  # noqa: S311 - replayed
        self.loop = Loop(rng)
        self.problems: list[str] = []
        self.server = Server(self.loop)
        self._schedule = schedule
        self._callers: list[Caller] = []
        self._faults = 0
        self._paused_until = 0.0
        self._closing: asyncio.Task[None] | None = None
        asyncio._set_running_loop(self.loop)
        self._router = Router(None, _TIMEOUT, 1)  # type: ignore[arg-type]
        self._router.deadline()
        self._connection = library.parts["Connection"](
            lambda: DriverConnection(self.server),
            _TIMEOUT,
            self._router._on_outage,
            _SERVER,
            lambda: None,
        )
        self._router._connections[_SERVER] = [self._connection]
        if schedule.small:
            bounds = {"max_in_flight": 2, "max_queued": 3, "batch_bytes": 100}
            self._connection.pipeline = library.parts["Pipeline"](**bounds)

    def run(self) -> None:
        """Take all steps, let all callers end, and close the router."""
        try:
            for step in self._schedule.steps:
                self.server.note(*step)
                if step.name in CALLS:
                    self._call(step)
                else:
                    self._take(step.name, step.argument)
                for _ in range(step.turns):
                    self.loop.turn()
            self._end()
            for caller in self._callers:
                self._judge(caller)
        except Exception as error:  # noqa: BLE001 - of a callback that the transport calls
            self.problems.append(f"exception: {error!r}")
        finally:
            self.problems += (f"exception: {error}" for error in self.loop.errors)
            self._router.close()
            for task in asyncio.all_tasks(self.loop):
                task.cancel()
            self.loop.settle()
            for socket in self.server.sockets:
                socket.open = False  # asyncio warns about others
            asyncio._set_running_loop(None)
            self.loop.close()

    @property
    def rule(self) -> str:
        """See above."""
        return self.problems[0].partition(":")[0] if self.problems else ""

    # The steps.

    def _take(self, name: str, argument: Any) -> None:  # noqa: C901, PLR0912 - a table
        """Take a step that is not a call; see `schedules`."""
        server, loop, latest = self.server, self.loop, self.server.latest()
        self._faults += name in HARMFUL
        match name:
            case "cancel":
                callers = [each for each in self._callers if not each.task.done()]
                for caller in callers[::-1][argument : argument + 1]:
                    caller.cancelled = caller.task.cancel()
            case "answer":
                server.answer()
            case "serve":
                any(each.serve(argument) for each in server.sockets)
            case "deliver":
                any(each.deliver(argument) for each in server.sockets)
            case "wait":
                self._wait(argument)
            case "tick":
                loop.settle()
                loop.now = max(loop.now, min(loop.next_timer(), loop.now + _TIMEOUT))
            case "drain":
                for each in server.sockets:
                    each.drain()
            case "refuse":
                self._faults += any(each.serve(1, argument) for each in server.sockets)
            case "stray":
                for each in latest:
                    each.replies += argument
            case "fill" | "mute":
                for each in latest:
                    each.full, each.mute = each.full or name == "fill", each.mute or name == "mute"
            case "lose":
                for each in latest:
                    if argument == "unread":
                        each.commands.clear()
                    each.lose(ConnectionResetError())
            case "pause":
                self._paused_until = loop.now = loop.now + argument
            case "accept":
                server.accepts = argument
            case "stop":
                for task in self._tasks():
                    task.cancel()
            case "close":
                self._closing = self._closing or loop.create_task(self._close())

    def _call(self, step: Step) -> None:
        number, (template, words) = step.number, CALLS[step.name]

        async def live() -> None:
            try:
                self._router.deadline()
                caller.deadline = self.loop.now + step.argument * _TIMEOUT
                command = template.fill(caller.deadline, b"%d" % number, *words)
                if step.name.endswith("_asking"):
                    command.ask()
                reply = await self._router.call(command)
                caller.result = reply.strip() if isinstance(reply, bytes) else b"%d" % reply
            except SessionError as error:
                caller.result = error
            finally:
                caller.late = self.loop.now - max(caller.deadline, self._paused_until)
                caller.written = self.server.written[number]
                self.server.note("end", number, repr(caller.result))

        caller = Caller(number, step.name, self.loop.create_task(live()))
        self._callers.append(caller)

    def _wait(self, seconds: float, *, served: bool = False) -> None:
        until = self.loop.now + seconds
        while True:
            self.loop.settle()
            if served:
                if self.server.answer():
                    continue
                self._check_idle()
            if (moment := self.loop.next_timer()) > until:
                break
            self.loop.now = moment
        self.loop.now = until

    # The end, and the rules.

    def _tasks(self) -> list["asyncio.Task[Any]"]:
        tasks = asyncio.all_tasks(self.loop)
        return [each for each in tasks if each.get_name().startswith("aiosessions")]

    async def _close(self) -> None:
        await self._router.aclose()
        leaks = {
            "task": self._tasks(),
            "timer": self.loop.next_timer() < _NEVER,
            "socket": self.server.latest(),
        }
        self.problems += (f"leak: {name}" for name, found in leaks.items() if found)

    def _check_idle(self) -> None:
        channel = self._connection.channel
        usable = channel is not None and channel.transport.open and not channel.transport.mute
        if usable and not all(each.task.done() for each in self._callers):
            self.problems.append("idle: a caller waits, and the server has answered everything")

    def _end(self) -> None:
        heals, pipeline = self._schedule.heals, self._connection.pipeline
        if heals:
            self.server.accepts = "yes"
            self._take("drain", "all")
        self._wait(3 * _TIMEOUT, served=heals)
        mute = any(each.open and each.mute for each in self.server.sockets)
        if self._closing is None:
            if pipeline.queued or pipeline.waiting or pipeline.in_flight or pipeline.orphans:
                self.problems.append("left: commands after all callers have ended")
            if heals and not mute:
                self._call(Step(1000, "load", 1.0, 0))
                self._wait(_TIMEOUT, served=True)
                if isinstance(self._callers[-1].result, SessionError):
                    self.problems.append("recovery: the next call fails")
        self._closing = self._closing or self.loop.create_task(self._close())
        self.loop.settle()
        if not all(each.done() for each in self.loop.futures):
            self.problems.append("leak: future")
        self.server.answer()  # a server may read old commands late

    def _judge(self, caller: Caller) -> None:
        number, result, applied = caller.number, caller.result, self.server.applied[caller.number]
        writes, done = not caller.name.startswith("load"), isinstance(result, bytes)
        failed, in_doubt = isinstance(result, SessionError), getattr(result, "in_doubt", False)
        calm = self._faults == 0 and self._connection.connects <= 1
        calm = calm and caller.late < 0 and "too many" not in str(result)
        broken = {
            "late": caller.late > (_GRACE if self._paused_until else 0),
            "no end": not caller.task.done(),
            "cancellation": caller.task.done() and caller.task.cancelled() != caller.cancelled,
            "sent late": self.server.written[number] != caller.written,
            "wrong reply": done and result != b"%d" % number,
            "not applied once": done and writes and applied != 1,
            "applied twice": applied > 1,
            "applied without doubt": failed and not in_doubt and applied > 0,
            "load in doubt": in_doubt and not writes,
            "no cause": failed and calm,
        }
        text = f"{caller.name} {number}, {result!r}"
        self.problems += (f"{rule}: {text}" for rule, found in broken.items() if found)


def run(schedule: Schedule, library: Library) -> Simulation:
    """Run a schedule once."""
    simulation = Simulation(schedule, library)
    simulation.run()
    return simulation


def find(seeds: range, library: Library) -> Schedule | None:
    """The first schedule that breaks a rule."""
    return next((each for each in map(draw, seeds) if run(each, library).problems), None)


def shrink(schedule: Schedule, library: Library) -> Schedule:
    """Remove steps as long as the same rule is broken (delta debugging)."""
    rule, size = run(schedule, library).rule, len(schedule.steps)
    while size:
        start = 0
        while start < len(schedule.steps):
            steps = schedule.steps[:start] + schedule.steps[start + size :]
            if run(smaller := schedule._replace(steps=steps), library).rule == rule:
                schedule = smaller
            else:
                start += size
        size //= 2
    return schedule


def main(arguments: Sequence[str] | None = None, library: Library | None = None) -> int:
    """Run schedules; return 1 if one breaks a rule, after printing it in a shorter form."""
    parser = argparse.ArgumentParser(description="Simulate a connection.")
    parser.add_argument("--schedules", type=int, default=1000, help="how many (default: 1000)")
    parser.add_argument("--seed", type=int, default=0, help="the first seed (default: 0)")
    options = parser.parse_args(arguments)
    start, library = time.perf_counter(), library or Library()
    failing = find(range(options.seed, options.seed + options.schedules), library)
    lines = [f"{options.schedules} schedules passed in {time.perf_counter() - start:.0f} s"]
    if failing is not None:
        failing = shrink(failing, library)
        outcome = run(failing, library)
        lines = [str(failing), *map(str, outcome.server.trace), *outcome.problems]
    print(*lines, sep="\n")  # noqa: T201 - the output of a command line
    return failing is not None


if __name__ == "__main__":
    sys.exit(main())
