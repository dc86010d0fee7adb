"""How an id travels between a client and the middleware: in a cookie, or in another header.

Cookies follow RFC 6265bis (https://datatracker.ietf.org/doc/draft-ietf-httpbis-rfc6265bis/).
"""

import re
from collections.abc import Iterable, Sequence
from typing import Literal, Protocol

Headers = Iterable[tuple[bytes, bytes]]

_is_token = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+", re.ASCII).fullmatch
_is_attribute = re.compile(r"[\x20-\x3a\x3c-\x7e]*", re.ASCII).fullmatch


class Transport(Protocol):
    """The transport of an id between a client and the middleware.

    Attributes:
        vary: The request header that holds the id, for `Vary`.
        ambient: Whether browsers send the id automatically, also with requests of other sites.
    """

    vary: str
    ambient: bool

    def read(self, headers: Headers) -> str | None:
        """Return the id that a request presents, well-formed or not; None if there is none."""
        ...

    def issue(self, id: str, max_age: int | None) -> Sequence[tuple[bytes, bytes]]:
        """Return the response headers that give an id to the client.

        Args:
            id: The id.
            max_age: The seconds for which the client may keep it; None for no limit.
        """
        ...

    def clear(self) -> Sequence[tuple[bytes, bytes]]:
        """Return the response headers that make the client forget its id."""
        ...


class CookieTransport(Transport):
    """The id in a cookie.

    Args:
        name: The name of the cookie. With the prefix `__Host-`, browsers accept it only from this
            host, over HTTPS; with `__Secure-`, only over HTTPS.
        secure: Send the cookie over HTTPS only.
        http_only: Hide the cookie from scripts of the page.
        same_site: The requests from other sites that carry the cookie: "lax" for links only,
            "strict" for none, "none" for all.
        domain: Send the cookie to this domain and its subdomains; by default to this host only.
        path: Send the cookie to paths below this one.
        partitioned: Keep one cookie for each site that embeds this one (CHIPS).

    Raises:
        ValueError: An attribute is malformed, or browsers would reject the combination.
    """

    vary = "Cookie"
    ambient = True

    def __init__(
        self,
        name: str = "session",
        *,
        secure: bool = True,
        http_only: bool = True,
        same_site: Literal["lax", "strict", "none"] = "lax",
        domain: str | None = None,
        path: str = "/",
        partitioned: bool = False,
    ) -> None:
        _check_name(name, secure=secure, is_host_only=domain is None and path == "/")
        if same_site not in ("lax", "strict", "none"):
            raise ValueError(f'same_site is "lax", "strict" or "none", not {same_site!r}')
        if not secure and (same_site == "none" or partitioned):
            what = "partitioned=True" if partitioned else 'same_site="none"'
            raise ValueError(f"{what} needs secure=True; browsers reject the cookie")
        if not path.startswith("/") or not _is_attribute(path):
            raise ValueError(f"the path of a cookie begins with '/', and {path!r} is not one")
        if domain is not None and not (domain and _is_attribute(domain)):
            raise ValueError(f"{domain!r} is not the domain of a cookie")
        self.name = name
        self._prefix = name.encode() + b"="
        attributes = [f"Path={path}"]
        if domain is not None:
            attributes.append(f"Domain={domain}")
        if secure:
            attributes.append("Secure")
        if http_only:
            attributes.append("HttpOnly")
        attributes.append(f"SameSite={same_site.capitalize()}")
        if partitioned:
            attributes.append("Partitioned")
        self._attributes = "; ".join(attributes)

    def __repr__(self) -> str:
        return f"CookieTransport({self.name!r}, {self._attributes!r})"

    def read(self, headers: Headers) -> str | None:
        """See `Transport.read`. Of several cookies of this name, the first counts."""
        for name, value in headers:
            if name == b"cookie":
                for pair in value.split(b";"):
                    pair = pair.strip(b" \t")  # noqa: PLW2901 - the same pair
                    if pair.startswith(self._prefix):
                        text = pair[len(self._prefix) :].decode("latin-1")
                        quoted = len(text) > 1 and text[0] == text[-1] == '"'
                        return text[1:-1] if quoted else text
        return None

    def issue(self, id: str, max_age: int | None) -> Sequence[tuple[bytes, bytes]]:
        """See `Transport.issue`."""
        return self._cookie(id if max_age is None else f"{id}; Max-Age={max_age}")

    def clear(self) -> Sequence[tuple[bytes, bytes]]:
        """See `Transport.clear`."""
        return self._cookie("; Max-Age=0; Expires=Thu, 01 Jan 1970 00:00:00 GMT")

    def _cookie(self, value: str) -> Sequence[tuple[bytes, bytes]]:
        text = f"{self.name}={value}; {self._attributes}"
        return [(b"set-cookie", text.encode("latin-1"))]


def _check_name(name: str, *, secure: bool, is_host_only: bool) -> None:
    if not _is_token(name):
        raise ValueError(f"a cookie's name is a token of RFC 9110, and {name!r} is not")
    prefix = name.lower()
    if prefix.startswith(("__host-", "__secure-")) and not secure:
        raise ValueError(f"the name {name} needs secure=True; browsers reject the cookie")
    if prefix.startswith("__host-") and not is_host_only:
        raise ValueError(f"the name {name} needs path='/' and no domain")


class HeaderTransport(Transport):
    """The id in a request header, for clients that are not browsers.

    The response has the header when the id is new.

    Args:
        name: The name of the header, such as "Mcp-Session-Id".

    Raises:
        ValueError: The name is not a token of RFC 9110.
    """

    ambient = False

    def __init__(self, name: str) -> None:
        if not _is_token(name):
            raise ValueError(f"a header's name is a token of RFC 9110, and {name!r} is not")
        self.vary = name
        self._name = name.lower().encode()

    def __repr__(self) -> str:
        return f"HeaderTransport({self.vary!r})"

    def read(self, headers: Headers) -> str | None:
        """See `Transport.read`."""
        for name, value in headers:
            if name == self._name:
                return value.decode("latin-1")
        return None

    def issue(self, id: str, max_age: int | None) -> Sequence[tuple[bytes, bytes]]:
        """See `Transport.issue`. Such a client keeps the id as long as it likes."""
        del max_age
        return [(self._name, id.encode("latin-1"))]

    def clear(self) -> Sequence[tuple[bytes, bytes]]:
        """See `Transport.clear`. No header does that, so the next request is anonymous."""
        return []
