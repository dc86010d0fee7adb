"""Types of `Session.data`, types that are hard to store, and the codecs for both."""

import enum
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypedDict

import msgspec
import pytest

from aiosessions import (
    Codec,
    JsonCodec,
    MsgpackCodec,
)

# Each makes a codec from a data type.
CODECS: dict[str, Callable[..., Codec[Any]]] = {"json": JsonCodec, "msgpack": MsgpackCodec}
both_codecs = pytest.mark.parametrize("make", CODECS.values(), ids=CODECS)

SECRET = "hunter2"
NUMBER = 424242


class Point(msgspec.Struct):
    """A struct that may hold another one."""

    x: int
    label: str = ""
    next: "Point | None" = None


@dataclass
class Cart:
    """A dataclass."""

    items: list[str]
    total: float = 0.0


class BigCart(Cart):
    """A subclass, which a codec of `Cart` cannot read back."""


class Item(msgspec.Struct):
    """A struct with a price, where None means that there is none."""

    price: float | None


class Basket(msgspec.Struct):
    """A struct with a list of structs."""

    items: list[Item]


class Loose(msgspec.Struct):
    """A struct with a field of any type."""

    x: Any


class Incomparable(msgspec.Struct, eq=False):
    """A struct that is equal only to itself."""

    x: float | None
    next: "Incomparable | None" = None


class Pair(NamedTuple):
    """A named tuple."""

    x: int
    y: float | None = None


class Totalled(msgspec.Struct):
    """A struct that computes a field from the others."""

    items: list[int]
    total: int = 0

    def __post_init__(self) -> None:
        self.total = sum(self.items)


class Options(TypedDict, total=False):
    """A TypedDict."""

    dark: bool
    size: int


class Circle(msgspec.Struct, tag=True):
    """One struct of a union."""

    radius: float


class Square(msgspec.Struct, tag=True):
    """The other struct of the union."""

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
    """A struct with an integer as its tag in a union."""


class Two(msgspec.Struct, tag=2):
    """Another struct with an integer as its tag."""


class Strict(msgspec.Struct, forbid_unknown_fields=True):
    """A struct that refuses unknown fields."""

    x: int = 0


class Quoting(msgspec.Struct):
    """A struct that quotes its value in the error, as many validators do."""

    x: Any

    def __post_init__(self) -> None:
        message = f"{self.x} is unsupported, says '{self.x}'"
        raise ValueError(message)


class Borrowing(msgspec.Struct):
    """A struct that raises an error of msgspec's own type."""

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
    """A struct that converts its value, and chains the error of that."""

    x: Any

    def __post_init__(self) -> None:
        try:
            msgspec.convert(self.x, Level)
        except msgspec.ValidationError as error:
            message = f"{self.x}"
            raise LookupError(message) from error
