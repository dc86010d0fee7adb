"""Errors of msgspec and of data types, without the payload that they may quote."""

import re

import msgspec

# The parts of msgspec's messages that come from types, not from the payload. Its messages also
# quote values, enum members and unknown fields; a message that is not listed here is not repeated.
_SAFE = re.compile(
    r"""
      Expected\ `[^`'"]+`(\ of\ length)?(\ [<>=]+\ [\d.]+)?(,\ got\ `[a-z]+`)?
    | Object\ missing\ required\ field\ `\w+`
    | Invalid\ (enum\ value|value|UUID|decimal\ string|epoch\ timestamp)
    | Invalid\ (RFC3339|base64|ISO8601|MessagePack)( [a-z]+)*
    | Input\ data\ was\ truncated
    | (JSON|MessagePack\ data)\ is\ malformed:\ [a-z ]+(\(byte\ \d+\))?
    | upgrade\ raised\ \w+
    | Encoding\ objects\ of\ type\ [\w.]+\ is\ unsupported
    """,
    re.VERBOSE,
)
_PATH = re.compile(r" - at (?:`key` in )?`\$[\w.\[\]]*`$")


def redacted(error: Exception) -> Exception:
    """The exception to chain to instead of `error`.

    It holds nothing of the payload: neither in its text nor in the locals of a traceback's frames.
    Of an exception that the data type raised, it tells the type only.
    """
    if error.__cause__ is not None:
        return msgspec.MsgspecError(f"the data type raised {type(error.__cause__).__name__}")
    if not isinstance(error, msgspec.MsgspecError | TypeError):
        return msgspec.MsgspecError(type(error).__name__)
    text = str(error)
    safe = _SAFE.match(text)
    path = _PATH.search(text)
    return msgspec.MsgspecError(
        f"{safe[0] if safe else 'a value or a field is refused'}{path[0] if path else ''}"
    )
