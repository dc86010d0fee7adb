"""The one place where what the driver and the server raise becomes an error of ours.

Invariants:

- Whatever goes wrong between here and the server is `StorageUnavailable`, but for a value of
  another type under the key, which is `CorruptSession`. Nothing becomes "not found".
- The message names the cause by what we know of it. Servers and drivers quote commands, hence
  session ids, in theirs: only a server's error code is taken over, and what we chain to is
  redacted.
"""

import os
import re

from redis.exceptions import (
    AuthenticationError,
    AuthorizationError,
    BusyLoadingError,
    RedisError,
    ResponseError,
)
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from ..errors import CorruptSession, SessionError, StorageUnavailable

# By the code, the first word, of a server's error reply.
_REFUSALS = {
    "READONLY": "the server is a read-only replica",
    "OOM": "the server is out of memory and evicts nothing",
    "NOAUTH": "the server asks for a password",
    "WRONGPASS": "the server refuses the user name or password",
    "NOPERM": "the user may not run a command, or use a key, that this storage needs",
    "LOADING": "the server is still loading its data",
    "MASTERDOWN": "the replica has lost its master",
    "NOREPLICAS": "the server has too few replicas to accept writes",
    "MISCONF": "the server cannot save to disk and accepts no writes",
    "CLUSTERDOWN": "the cluster is down",
    "TRYAGAIN": "the cluster is moving this slot",
    "BUSY": "the server is busy with a script",
}
# By the type of an exception, where the driver has dropped the code.
_CAUSES: tuple[tuple[tuple[type[Exception], ...], str], ...] = (
    ((TimeoutError, RedisTimeoutError), "the server did not answer in time"),
    ((AuthenticationError, AuthorizationError), _REFUSALS["WRONGPASS"]),
    ((BusyLoadingError,), _REFUSALS["LOADING"]),
)
_CODE = re.compile(r"[A-Z]{3,}")
# Redis before 7 reports what a command in a script raised inside a message of its own.
_IN_A_SCRIPT = re.compile(r"running script .*?-?\b(READONLY|OOM|NOPERM|MISCONF|WRONGTYPE)\b")


def translated(error: Exception) -> SessionError:
    """The error of ours that says what `error` means, chained to it; a new one for each caller."""
    if isinstance(error, SessionError):
        return type(error)(*error.args)
    # What follows is what was sent.
    text = str(error).partition(", with args beginning with")[0]
    code = _code(error, text)
    ours: SessionError
    if code == "WRONGTYPE":
        ours = CorruptSession("the key holds no string, hence no session record")
    else:
        ours = StorageUnavailable(_REFUSALS.get(code) or _cause(error, code, text))
    ours.__cause__ = _redacted(error, code)
    return ours


def _code(error: Exception, text: str) -> str:
    """The code that a server's error reply begins with, which the driver may have cut off."""
    if not isinstance(error, RedisError):
        return ""
    if "user executing the script can't run" in text or text.startswith("ACL failure in script"):
        return "NOPERM"
    if inner := _IN_A_SCRIPT.search(text):
        return inner[1]
    code = getattr(error, "status_code", None) or text.partition(" ")[0]
    return code if _CODE.fullmatch(code) else ""


def _cause(error: Exception, code: str, text: str) -> str:
    """What is wrong, where no code of the server's says it."""
    for kinds, cause in _CAUSES:
        if isinstance(error, kinds):
            return cause
    if text.lower().startswith(("unknown command 'getex'", "unknown command `getex`")):
        return "the server has no GETEX: Redis 6.2 or later, or Valkey, is needed"
    if isinstance(error, ResponseError):
        return f"the server answered with an error: {code or 'ERR'}"
    if _is_the_drivers(error):
        return f"the connection to the server failed: {text}"
    return f"the connection to the server failed ({type(error).__name__})"


# How the texts of the driver's own begin: what it did, where, and what the system says.
_THE_DRIVERS = re.compile(
    r"Error ((-?\d+|UNKNOWN) )?(connecting to|while (reading from|writing to)) "
    r"|Connection (closed by server|lost|not ready)"
)


def _is_the_drivers(error: Exception) -> bool:
    """Whether the text is the driver's own."""
    return type(error) is RedisConnectionError and bool(_THE_DRIVERS.match(str(error)))


def _redacted(error: Exception, code: str) -> Exception:
    """What to chain to: `error`, or one in its place.

    Any other text, and what is chained to that in turn, may quote what was sent, or be an
    application's own credential provider's, which may tell what it knows.
    """
    if _is_the_drivers(error):
        return error
    cause: Exception
    if isinstance(error, OSError) and type(error).__module__ == "builtins":
        cause = OSError(error.errno, os.strerror(error.errno)) if error.errno else type(error)()
    else:
        cause = RedisError(f"{type(error).__name__} {code}".rstrip())
    return cause.with_traceback(error.__traceback__)
