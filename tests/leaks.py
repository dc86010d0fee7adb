"""Everything that an error tells a log or an error tracker."""

from traceback import TracebackException


def chain_of(error: BaseException) -> list[BaseException]:
    """An error, its causes and its contexts.

    A context that `from None` hides is included, because error trackers record it.
    """
    chain: list[BaseException] = []
    rest: list[BaseException | None] = [error]
    while rest:
        each = rest.pop()
        if each is not None and each not in chain:
            chain.append(each)
            rest += [each.__cause__, each.__context__]
    return chain


def said_by(error: BaseException) -> str:
    """The texts and the attributes of an error and of its chain."""
    return "\n".join(f"{each}\n{each!r}\n{vars(each)!r}" for each in chain_of(error))


def locals_in(error: BaseException) -> str:
    """The tracebacks of an error and of its chain, with the local variables of every frame."""
    return "".join(
        line
        for each in chain_of(error)
        for line in TracebackException.from_exception(each, capture_locals=True).format(chain=False)
    )
