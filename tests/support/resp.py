"""Cuts a stream of bytes into RESP values.

See https://redis.io/docs/latest/develop/reference/protocol-spec/. Streamed types are not supported.
"""


class Framer:
    """Cuts a stream of bytes into RESP values. The attributes of a value are a part of it."""

    def __init__(self) -> None:
        self._rest = bytearray()

    def feed(self, chunk: bytes) -> list[bytes]:
        """Take more bytes, and return the values that are complete now.

        Raises:
            ValueError: The bytes are not RESP.
        """
        self._rest += chunk
        values: list[bytes] = []
        start = 0
        while (end := _end(self._rest, start)) is not None:
            values.append(bytes(self._rest[start:end]))
            start = end
        del self._rest[:start]
        return values


def _end(stream: bytearray, at: int) -> int | None:
    """The end of the value that begins at `at`; None if the value is not complete."""
    missing = 1  # values, however deeply they are nested
    while missing:
        line_end = stream.find(b"\r\n", at)
        if line_end < 0:
            return None
        kind, line = bytes(stream[at : at + 1]), stream[at + 1 : line_end]
        at = line_end + 2
        missing -= 1
        if kind in (b"$", b"=", b"!"):
            if int(line) >= 0:  # -1 is RESP2's null
                at += int(line) + 2
        elif kind in (b"*", b"~", b">"):
            missing += max(0, int(line))
        elif kind == b"%":
            missing += 2 * int(line)
        elif kind == b"|":
            missing += 2 * int(line) + 1  # and the value that has these attributes
        elif kind not in (b"+", b"-", b":", b"_", b"#", b",", b"("):
            raise ValueError(f"RESP has no type {kind!r}")
    return at if at <= len(stream) else None
