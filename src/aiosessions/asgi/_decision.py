"""What becomes of a session when the response begins: one decision, by a pure, total function.

    first that holds                                    outcome
    deleted, and there is a session                     DELETE
    nothing is loaded, and something is to be stored    CREATE
    nothing is loaded, and the id was unknown           CLEAR
    new rights (another principal, `rotate()`)          ROTATE
    changed                                             SAVE
    the cookie is due                                   ISSUE
    otherwise                                           NOTHING

A response that failed (a status from 400 on, or an exception) gives no new rights. One that broke
(a status from 500 on, or an exception) stores nothing either, because it may be half done.
"""

import enum
from dataclasses import dataclass


class Outcome(enum.Enum):
    """What the middleware does before the head of the response leaves."""

    NOTHING = "nothing"
    """No command, no header."""
    ISSUE = "issue"
    """Send the id again, so that the client keeps it for a full TTL."""
    CREATE = "create"
    """Store a new session, and issue its id."""
    SAVE = "save"
    """Store the changes, and issue the id."""
    ROTATE = "rotate"
    """Move the session to a new id, and issue that."""
    DELETE = "delete"
    """Delete the session, and make the client forget the id."""
    CLEAR = "clear"
    """Make the client forget an id without a session."""


@dataclass(frozen=True, slots=True)
class Signals:
    """The facts of one request.

    Attributes:
        loaded: There is a session.
        unknown: The client presented an id, and there is no session.
        changed: Data or metadata differ from those that were loaded; for a new session, from empty.
        new_rights: The principal was changed, or a rotation was asked for.
        deleted: The application deleted the session.
        failed: The status of the response is 400 or more, or there was an exception.
        broken: The status is 500 or more, or there was an exception.
        due: The client would soon forget the id.
    """

    loaded: bool = False
    unknown: bool = False
    changed: bool = False
    new_rights: bool = False
    deleted: bool = False
    failed: bool = False
    broken: bool = False
    due: bool = False


def decide(signals: Signals) -> Outcome:
    """Decide what becomes of the session."""
    changed = signals.changed and not signals.broken
    new_rights = signals.new_rights and not (signals.failed or signals.broken)
    if signals.deleted and signals.loaded:
        return Outcome.DELETE
    if not signals.loaded:
        if (changed or new_rights) and not signals.deleted:
            return Outcome.CREATE
        return Outcome.CLEAR if signals.unknown else Outcome.NOTHING
    if new_rights:
        return Outcome.ROTATE
    if changed:
        return Outcome.SAVE
    return Outcome.ISSUE if signals.due else Outcome.NOTHING
