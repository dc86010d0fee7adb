"""What applications keep in `Session.data`, types that make trouble, and the codecs for both."""

import enum
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypedDict

import msgspec
import pytest

from aiosessions import (
    Codec,
    JsonCodec,
    MsgpackCodec,
)

# Called with a data type, each makes a codec.
CODECS: dict[str, Callable[..., Codec[Any]]] = {"json": JsonCodec, "msgpack": MsgpackCodec}
both_codecs = pytest.mark.parametrize("make", CODECS.values(), ids=CODECS)

SECRET = "hunter2"
NUMBER = 424242


class Point(msgspec.Struct):
    """A struct, which may hold another one."""

    x: int
    label: str = ""
    next: "Point | None" = None


@dataclass
class Cart:
    """A dataclass."""

    items: list[str]
    total: float = 0.0


class Options(TypedDict, total=False):
    """A TypedDict."""

    dark: bool
    size: int


class Circle(msgspec.Struct, tag=True):
    """One half of a union."""

    radius: float


class Square(msgspec.Struct, tag=True):
    """The other half."""

    side: int


class Colour(enum.Enum):
    """An enum of strings."""

    RED = "red"
    BLUE = "blue"


class Level(enum.IntEnum):
    """An enum of integers."""

    LOW = 1
    HIGH = 2


class One(msgspec.Struct, tag=1):
    """A struct whose tag in a union is an integer."""


class Two(msgspec.Struct, tag=2):
    """Another one."""


class Strict(msgspec.Struct, forbid_unknown_fields=True):
    """A struct that accepts no field that it does not know."""

    x: int = 0


class Quoting(msgspec.Struct):
    """A struct that quotes its value when it refuses it, like many a validator."""

    x: Any

    def __post_init__(self) -> None:
        message = f"{self.x} is unsupported, says '{self.x}'"
        raise ValueError(message)


class Borrowing(msgspec.Struct):
    """A struct that raises what msgspec raises."""

    x: Any

    def __post_init__(self) -> None:
        message = f"{self.x} is wrong"
        raise msgspec.ValidationError(message)


class TwoWordsError(msgspec.ValidationError):
    """An error that cannot be made of one text."""

    def __init__(self, first: object, second: object) -> None:
        super().__init__(f"{first} {second}")


class Demanding(msgspec.Struct):
    """A struct that raises an error which cannot be made of one text."""

    x: Any

    def __post_init__(self) -> None:
        raise TwoWordsError(self.x, self.x)


class Nesting(msgspec.Struct):
    """A struct that reads JSON inside JSON, and chains what goes wrong there."""

    x: Any

    def __post_init__(self) -> None:
        try:
            msgspec.convert(self.x, Level)
        except msgspec.ValidationError as error:
            message = f"{self.x}"
            raise LookupError(message) from error
