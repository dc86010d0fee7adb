"""The one place that turns errors of the driver and of the server into errors of this package.

Invariants:

- Every failure between this process and the server is `StorageUnavailable`, except a value of
  another type under the key, which is `CorruptSession`. No failure becomes "not found".
- Servers and drivers quote commands, and so session ids, in their texts. A message of ours holds
  only the code of an error reply, the address, and texts of the operating system.
- The cause of an error is a fresh exception without a traceback, because frames hold the commands
  of other callers.
"""

import os
import re
import socket
import ssl
from typing import Final

from redis.exceptions import AuthenticationError, AuthorizationError, RedisError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError

from ..errors import CorruptSession, SessionError, StorageClosed, StorageUnavailable

_REFUSALS: Final = {
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
    "MOVED": "the nodes of the cluster redirect in circles",
    "ASK": "the nodes of the cluster redirect in circles",
}
# A connection is useless for commands after these, until the server or its role has changed.
CONNECTION_REFUSALS: Final = frozenset({"READONLY", "LOADING", "MASTERDOWN", "NOAUTH"})

_CODE = re.compile(r"[A-Z]{3,}")
# Redis before 7 wraps the error of a command in a script into a message of its own.
_IN_SCRIPT = re.compile(r"running script .*?-?\b(READONLY|OOM|NOPERM|MISCONF|WRONGTYPE)\b")
_NOT_PERMITTED_IN_SCRIPT: Final = ("user executing the script can't", "ACL failure in script")
_MISSING_RIGHT: Final = re.compile(r"permissions? to run the '([a-z|]+)' command")
_TOO_MANY_CLIENTS: Final = "max number of clients reached"
_TEXTS: Final = (
    ("DB index is out of range", "the server has no database of this number"),
    (_TOO_MANY_CLIENTS, "the server has as many clients as it accepts"),
    ("AUTH <password> called without any password", "the server has no password configured"),
    ("invalid username-password pair", _REFUSALS["WRONGPASS"]),
    ("invalid password", _REFUSALS["WRONGPASS"]),
)
_UNKNOWN_GETEX: Final = ("unknown command 'getex'", "unknown command `getex`")


class ErrorReply(Exception):
    """An error reply of a server, as a value. Its text may quote a command: never show it.

    Attributes:
        code: The first word of the reply, such as "READONLY"; "ERR" if it is not a code.
        text: The whole reply.
    """

    def __init__(self, text: str) -> None:
        super().__init__()
        # The text after this phrase is the command.
        self.text = text.partition(", with args beginning with")[0]
        if any(phrase in text for phrase in _NOT_PERMITTED_IN_SCRIPT):
            self.code = "NOPERM"
        elif inner := _IN_SCRIPT.search(text):
            self.code = inner[1]
        else:
            code = text.partition(" ")[0]
            self.code = code if _CODE.fullmatch(code) else "ERR"


class ProtocolError(RedisError):
    """The server sent bytes or a reply that cannot follow the commands that were sent."""


class ConnectionLost(RedisError):
    """The connection ended. The text names the reason and holds no data."""


class ConnectError(RedisError):
    """The connection could not be made.

    Attributes:
        transient: Whether another attempt may succeed without a change of the settings.
    """

    def __init__(self, message: str, *, transient: bool) -> None:
        super().__init__(message)
        self.transient = transient


def translate(error: Exception, address: str, *, in_doubt: bool = False) -> SessionError:
    """Make the `SessionError` for a failed command; a new one for each caller.

    Args:
        error: The reason.
        address: The address of the server, for the message.
        in_doubt: See `StorageUnavailable`.
    """
    if isinstance(error, StorageUnavailable | StorageClosed):
        return type(error)(*error.args, in_doubt=in_doubt)
    if isinstance(error, SessionError):
        return type(error)(*error.args)
    ours: SessionError
    if isinstance(error, ErrorReply) and error.code == "WRONGTYPE":
        ours = CorruptSession("the key holds another type of value, not a session record")
    else:
        doubt = "; the write may have been applied" if in_doubt else ""
        ours = StorageUnavailable(f"{reason(error)} ({address}){doubt}", in_doubt=in_doubt)
    ours.__cause__ = _redacted(error)
    return ours


def connect_error(error: Exception, address: str, *, tls: bool) -> ConnectError:
    """Explain why a connection could not be made, with the likely mend.

    Args:
        error: The exception of the driver. Its text may hold anything.
        address: The address that was tried.
        tls: Whether the connection uses TLS.
    """
    if isinstance(error, ConnectError):
        return error
    explain = _explain_tls if tls else _explain_plain
    chain = _chain(error)
    for each in chain:
        # Some error replies become another exception, but all of these have the code.
        if isinstance(each, _REPLIES) or getattr(each, "status_code", None):
            reply = as_reply(each)
            transient = reply.code in _TRANSIENT_REFUSALS or _TOO_MANY_CLIENTS in reply.text
            return ConnectError(reason(reply), transient=transient)
        if problem := explain(each):
            return ConnectError(problem, transient=False)
    if any(isinstance(each, socket.gaierror) for each in chain):
        text = f"the host name {address.rpartition(':')[0]} cannot be resolved"
    elif any(isinstance(each, TimeoutError | RedisTimeoutError) for each in chain):
        text = f"{reason(TimeoutError())}{_NO_TLS if tls else ''}"
    elif numbers := [number for number in map(_errno, chain) if number]:
        text = f"cannot connect: {os.strerror(numbers[0])}"
    elif any(str(each).startswith("Multiple exceptions") for each in chain):
        text = "cannot connect to any address of the host"
    elif any(str(each).startswith("Connection closed by server") for each in chain):
        text = "the server closed the connection during the handshake"
        text += _NO_TLS if tls else _USE_TLS
    else:
        # An exception of a credential provider, say: its text may hold a secret.
        text = f"cannot connect: {type(chain[-1]).__name__}"
    return ConnectError(text, transient=True)


def _explain_tls(error: BaseException) -> str:
    """The fault of the TLS settings, if `error` is one."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"certificate verify failed: {error.verify_message}"
    if isinstance(error, ssl.SSLError):
        hint = _NO_TLS if error.reason in _NOT_TLS else ""
        return f"the TLS handshake failed ({error.reason or 'no reason'}){hint}"
    if isinstance(error, FileNotFoundError | PermissionError) and error.errno:
        return f"a file of the TLS settings cannot be read: {os.strerror(error.errno)}"
    return ""


def _explain_plain(error: BaseException) -> str:
    """The fault of a server that does not speak RESP, if `error` is one."""
    if isinstance(error, ProtocolError) or type(error).__name__ in _NOT_RESP:
        return f"the answer is not in the protocol of Redis{_USE_TLS}"
    return ""


_REPLIES: Final = (ResponseError, AuthenticationError, AuthorizationError)
_NO_TLS: Final = "; if the server does not use TLS, the URL begins with redis://"
_USE_TLS: Final = "; if the server uses TLS, the URL begins with rediss://"
_TRANSIENT_REFUSALS: Final = CONNECTION_REFUSALS - {"NOAUTH"}
_NOT_TLS: Final = frozenset({"WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "UNEXPECTED_MESSAGE"})
_NOT_RESP: Final = frozenset({"InvalidResponse", "ProtocolError"})


def as_reply(error: BaseException) -> ErrorReply:
    """The error reply behind an exception of the driver, which may have cut off the code."""
    text = str(error)
    code = getattr(error, "status_code", None)
    if not code and isinstance(error, AuthenticationError | AuthorizationError):
        code = "WRONGPASS"
    return ErrorReply(f"{code} {text}" if code and not text.startswith(str(code)) else text)


def reason(error: Exception) -> str:
    """Why a command failed, in words that hold no data."""
    if isinstance(error, ErrorReply):
        return _reason_of_reply(error)
    if isinstance(error, TimeoutError | RedisTimeoutError):
        return "the server did not answer in time"
    if isinstance(error, ProtocolError | ConnectionLost | ConnectError):
        return str(error)
    return f"the connection failed: {type(error).__name__}"


def _reason_of_reply(reply: ErrorReply) -> str:
    for text, meaning in _TEXTS:
        if text in reply.text:
            return meaning
    if reply.text.lower().removeprefix("err ").startswith(_UNKNOWN_GETEX):
        return "the server has no GETEX: Redis 6.2 or later, or Valkey, is needed"
    if reply.code == "NOPERM":
        if "channel" in reply.text:
            return "the user may not use the channel on which this storage announces changes"
        if command := _MISSING_RIGHT.search(reply.text):
            return f"the user may not run {command[1].upper()}, which this storage needs"
    return _REFUSALS.get(reply.code, f"the server answered with an error: {reply.code}")


def lost(error: Exception | None) -> ConnectionLost:
    """Why an established connection ended; None means that the server closed it."""
    if error is None:
        return ConnectionLost("the server closed the connection")
    number = _errno(error)
    cause = os.strerror(number) if number else type(error).__name__
    return ConnectionLost(f"the connection was lost: {cause}")


def _errno(error: BaseException) -> int:
    """The number of an error of the operating system; 0 for another exception."""
    number = error.errno if isinstance(error, OSError) else None
    return number if isinstance(number, int) else 0


def _chain(error: BaseException | None) -> list[BaseException]:
    """An exception and its causes, from the outside in."""
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found


def _redacted(error: Exception) -> Exception:
    """The cause to chain: the same kind of error, with a text that holds no data."""
    if isinstance(error, ErrorReply):
        return ResponseError(error.code)
    if isinstance(error, TimeoutError | RedisTimeoutError):
        return TimeoutError()
    if isinstance(error, ConnectError):
        return ConnectError(*error.args, transient=error.transient)
    if isinstance(error, ProtocolError | ConnectionLost):
        return type(error)(*error.args)
    return RedisError(type(error).__name__)
