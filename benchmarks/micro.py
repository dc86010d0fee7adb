"""Micro-benchmarks of codecs and of `LocalStorage`, which pyperf runs in new processes.

Each codec turns a whole session into bytes and back, to an equal `Session` with aware datetimes, as
users of the library would write it. "msgspec" is the encoder and the decoder of `JsonCodec` without
the checks of `JsonCodec`. "EncryptedCodec" wraps `JsonCodec`.

It prints the time per KB of each codec:

    python -m benchmarks.micro --what=codecs --size=8000 --processes=3 --quiet
"""

import asyncio
import json
import pickle
import time
from datetime import datetime
from itertools import cycle
from typing import Any

import msgspec
import orjson
import pyperf

from aiosessions import (
    EncryptedCodec,
    JsonCodec,
    LocalStorage,
    MsgpackCodec,
    Session,
    new_session_id,
)

from .workload import CODEC, TTL, session


def _fields(made: Session[Any]) -> dict[str, Any]:
    dates = {name: getattr(made, name).isoformat() for name in ("created_at", "updated_at")}
    names = ("id", "kind", "principal", "metadata", "data")
    return {name: getattr(made, name) for name in names} | dates


def _session(fields: dict[str, Any]) -> Session[Any]:
    for name in ("created_at", "updated_at"):
        fields[name] = datetime.fromisoformat(fields[name])
    return Session(**fields)


class Tool(msgspec.Struct):
    """A tool in the data of a sample."""

    name: str
    server: str
    allowed: bool


class Data(msgspec.Struct):
    """The data of a sample, typed."""

    counter: int
    note: str
    tools: list[Tool] = []


_TYPED = "JsonCodec(Data)"


def _codecs() -> dict[str, tuple[Any, Any]]:
    """An encoder and a decoder by name."""
    ours: dict[str, Any] = {
        "JsonCodec": JsonCodec(),
        _TYPED: JsonCodec(Data),
        "MsgpackCodec": MsgpackCodec(),
        "EncryptedCodec": EncryptedCodec(JsonCodec(), [bytes(32)]),
    }
    return {
        **{name: (codec.encode, codec.decode) for name, codec in ours.items()},
        "msgspec": (msgspec.json.Encoder().encode, msgspec.json.Decoder(Session[Any]).decode),
        "json": (
            lambda made: json.dumps(_fields(made), separators=(",", ":")).encode(),
            lambda payload: _session(json.loads(payload)),
        ),
        "orjson": (
            lambda made: orjson.dumps(_fields(made)),
            lambda payload: _session(orjson.loads(payload)),
        ),
        "pickle": (lambda made: pickle.dumps(made, pickle.HIGHEST_PROTOCOL), pickle.loads),
    }


def _time_codecs(runner: Any, size: int) -> None:
    for name, (encode, decode) in _codecs().items():
        made = session(size, id="0123456789abcdefghijklmnopqrstuvwxyzABCDEFG")
        if name == _TYPED:
            made.data = msgspec.convert(made.data, Data)
        payload = encode(made)
        if decode(payload) != made:
            raise AssertionError(f"{name} does not give back what it was given")
        labels = {"codec": name, "payload": len(payload)}
        for does, function, argument in (("encode", encode, made), ("decode", decode, payload)):
            metadata = labels | {"does": does}
            timed = runner.bench_func(f"{name} {does}", function, argument, metadata=metadata)
            if not runner.args.worker:
                per_kb = timed.mean() * 1e9 / size
                print(f"{name} {does}: {per_kb:.2f} us per KB", flush=True)


class Clock:
    """The real clock, with an offset."""

    def __init__(self) -> None:
        self.ahead = 0.0

    def monotonic(self) -> float:
        """Seconds, plus the offset."""
        return time.monotonic() + self.ahead

    def time(self) -> float:
        """Seconds since the epoch, plus the offset."""
        return time.time() + self.ahead


async def filled(size: int, clock: Clock) -> tuple[LocalStorage[Any], list[str]]:
    """A storage with sessions, and their ids."""
    storage = LocalStorage[Any](ttl=TTL, max_sessions=size, codec=CODEC, clock=clock)
    ids = [new_session_id() for _ in range(size)]
    template = session()
    for id in ids:
        template.id = id
        await storage.store(template)
    return storage, ids


def _time_local(runner: Any, size: int) -> None:
    storage, ids = asyncio.run(filled(size, Clock()))
    template = session()
    next_id = cycle(ids).__next__

    async def store() -> None:
        template.id = next_id()
        await storage.store(template)

    async def load() -> None:
        await storage.load(next_id())

    for does, function in (("store", store), ("load", load)):
        runner.bench_async_func(f"{does} {size}", function, metadata={"does": does})


def main() -> None:
    """Time one size; the other options are pyperf's."""

    def pass_on(command: list[str], args: Any) -> None:
        command += [f"--what={args.what}", f"--size={args.size}"]

    runner = pyperf.Runner(program_args=("-m", "benchmarks.micro"), add_cmdline_args=pass_on)
    runner.argparser.add_argument("--what", choices=["codecs", "local"], required=True)
    runner.argparser.add_argument("--size", type=int, required=True)
    args = runner.parse_args()
    (_time_codecs if args.what == "codecs" else _time_local)(runner, args.size)


if __name__ == "__main__":
    main()
