"""Everything that an error would tell a log."""

from collections.abc import Iterator


def said_by(error: BaseException) -> str:
    """All text of an error, its attributes and whatever it is chained to, one way or another.

    What `from None` only hides counts, too: error trackers show it.
    """
    return "\n".join(_texts(error, set()))


def _texts(error: BaseException, seen: set[int]) -> Iterator[str]:
    if id(error) in seen:
        return
    seen.add(id(error))
    yield str(error)
    yield repr(error)
    yield repr(error.args)
    yield repr(vars(error))
    for chained in (error.__cause__, error.__context__):
        if chained is not None:
            yield from _texts(chained, seen)
