"""The fate of a session when the response begins: one decision, by a pure, total function.

    first that holds                                     outcome
    deleted, and something is set since then             REPLACE
    deleted                                              DELETE
    nothing is loaded, and something is set              CREATE
    nothing is loaded, and the client's id is unknown    CLEAR
    another principal, or `rotate()`                     ROTATE
    changed                                              SAVE
    the cookie is due                                    ISSUE
    otherwise                                            NOTHING

A response that failed (a status from 400 on) gives no new rights. One that broke (a status from 500
on) stores no data either, because the data may be half done. A deletion, and the loss of the
principal, hold with every response.
"""

import enum
from dataclasses import dataclass


class Outcome(enum.Enum):
    """The work of the middleware before the head of the response leaves."""

    NOTHING = "nothing"
    """No command, no header."""
    ISSUE = "issue"
    """Send the id again, so that the client keeps it for a full TTL."""
    CREATE = "create"
    """Store a new session, and issue its id."""
    SAVE = "save"
    """Store the changes. Send the id again if that is due."""
    ROTATE = "rotate"
    """Move the session to a new id, and issue that."""
    REPLACE = "replace"
    """Delete the session, store a new one, and issue its id."""
    DELETE = "delete"
    """Delete the session, and make the client forget the id."""
    CLEAR = "clear"
    """Make the client forget an id without a session."""


@dataclass(frozen=True, slots=True)
class Signals:
    """The facts of one request.

    Attributes:
        loaded: There is a stored session, and the application has not deleted it.
        unknown: The client presented an id without a session.
        deleted: The application deleted the stored session.
        changed: Data or metadata differ from those that were loaded; for a new session, from empty.
        new_rights: There is another principal, or the application called `rotate`.
        lost_rights: The application set the principal to None.
        failed: The status of the response is 400 or more.
        broken: The status is 500 or more.
        due: The client would soon forget the id.
    """

    loaded: bool = False
    unknown: bool = False
    deleted: bool = False
    changed: bool = False
    new_rights: bool = False
    lost_rights: bool = False
    failed: bool = False
    broken: bool = False
    due: bool = False


def decide(signals: Signals) -> Outcome:
    """Decide the fate of the session."""
    changed = signals.changed and not signals.broken
    new_rights = signals.new_rights and not (signals.failed or signals.broken)
    if signals.deleted:
        return Outcome.REPLACE if changed or new_rights else Outcome.DELETE
    if not signals.loaded:
        if changed or new_rights:
            return Outcome.CREATE
        return Outcome.CLEAR if signals.unknown else Outcome.NOTHING
    if new_rights or signals.lost_rights:
        return Outcome.ROTATE
    if changed:
        return Outcome.SAVE
    return Outcome.ISSUE if signals.due else Outcome.NOTHING
