"""Times codecs with pyperf, which runs this module in new processes; see `scenarios.codecs`.

Each codec turns a whole session into bytes and back, to an equal `Session` with aware datetimes, as
users of the library would write it. "msgspec" is the encoder and the decoder of `JsonCodec` without
the checks of `JsonCodec`.
"""

import json
import pickle
from collections.abc import Callable
from datetime import datetime
from typing import Any, Final

import msgspec
import orjson
import pyperf

from aiosessions import JsonCodec, MsgpackCodec, Session

from .workload import session

SIZES: Final = (200, 1_000, 10_000, 50_000)

Encode = Callable[[Session[Any]], bytes]
Decode = Callable[[bytes], Session[Any]]


def _fields(made: Session[Any]) -> dict[str, Any]:
    return {
        "id": made.id,
        "kind": made.kind,
        "principal": made.principal,
        "metadata": made.metadata,
        "data": made.data,
        "created_at": made.created_at.isoformat(),
        "updated_at": made.updated_at.isoformat(),
    }


def _session(fields: dict[str, Any]) -> Session[Any]:
    fields["created_at"] = datetime.fromisoformat(fields["created_at"])
    fields["updated_at"] = datetime.fromisoformat(fields["updated_at"])
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


TYPED: Final = "JsonCodec(Data)"


def codecs() -> dict[str, tuple[Encode, Decode]]:
    """The codecs by name."""
    ours: dict[str, JsonCodec[Any] | MsgpackCodec[Any]] = {
        "JsonCodec": JsonCodec(),
        TYPED: JsonCodec(Data),
        "MsgpackCodec": MsgpackCodec(),
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
        "pickle": (
            lambda made: pickle.dumps(made, pickle.HIGHEST_PROTOCOL),
            pickle.loads,
        ),
    }


def sample(size: int, *, typed: bool = False) -> Session[Any]:
    """A session with a record of about `size` bytes; the same one in every process."""
    made = session(size, id="0123456789abcdefghijklmnopqrstuvwxyzABCDEFG")
    if typed:
        made.data = msgspec.convert(made.data, Data)
    return made


def main() -> None:
    """Time each codec at each size; the options are pyperf's."""
    runner = pyperf.Runner(
        program_args=("-m", "benchmarks.codec_timings"),
        add_cmdline_args=lambda command, args: command.extend(
            ["--sizes", *(str(size) for size in args.sizes)]
        ),
    )
    runner.argparser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    args = runner.parse_args()
    for size in args.sizes:
        for name, (encode, decode) in codecs().items():
            made = sample(size, typed=name == TYPED)
            payload = encode(made)
            if decode(payload) != made:
                message = f"{name} does not give back what it was given"
                raise AssertionError(message)
            metadata = {"codec": name, "size": size, "payload": len(payload)}
            runner.bench_func(
                f"{name} {size} encode", encode, made, metadata=metadata | {"does": "encode"}
            )
            runner.bench_func(
                f"{name} {size} decode", decode, payload, metadata=metadata | {"does": "decode"}
            )


if __name__ == "__main__":
    main()
