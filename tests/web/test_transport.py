"""How an id travels: the cookie, and the header."""

from typing import Any

import pytest

from aiosessions.asgi import CookieTransport, HeaderTransport


@pytest.mark.parametrize(
    ("lines", "id"),
    [
        ([], None),
        (["a=b"], None),
        (["xsession=1; session=2"], "2"),
        (["a=b;session=1"], "1"),
        (["a=b", "c=d; session=1"], "1"),  # HTTP/2 may split the cookies
        (["session=1; session=2"], "1"),  # the more specific path comes first
        (['session="1"'], "1"),
        (["session="], ""),
        (['session="'], '"'),
        (["session=a=b"], "a=b"),
        (["session=\xe9"], "\xe9"),
        (["session=" + "x" * 300], "x" * 300),
        (["Session=1"], None),
    ],
)
def test_cookie_is_read(lines: list[str], id: str | None) -> None:
    """Servers send lower-case names, and bytes in Latin-1."""
    headers = [(b"accept", b"session=0"), *((b"cookie", each.encode("latin-1")) for each in lines)]
    assert CookieTransport().read(headers) == id


def test_cookie_has_safe_attributes() -> None:
    """The defaults are those of the OWASP cheat sheet."""
    ((name, value),) = CookieTransport().issue("x", 60)
    assert name == b"set-cookie"
    assert value == b"session=x; Max-Age=60; Path=/; Secure; HttpOnly; SameSite=Lax"
    assert CookieTransport().issue("x", None)[0][1].startswith(b"session=x; Path=/;")
    ((_, cleared),) = CookieTransport(domain="example.com", path="/a", same_site="strict").clear()
    assert cleared.startswith(b"session=; Max-Age=0; Expires=Thu, 01 Jan 1970")
    assert cleared.endswith(b"Path=/a; Domain=example.com; Secure; HttpOnly; SameSite=Strict")
    ((_, value),) = CookieTransport(
        "__Host-s", http_only=False, same_site="none", partitioned=True
    ).issue("x", 1)
    assert value == b"__Host-s=x; Max-Age=1; Path=/; Secure; SameSite=None; Partitioned"


@pytest.mark.parametrize(
    "settings",
    [
        {"name": "a b"},
        {"name": ""},
        {"name": "a;b"},
        {"name": "__Host-a", "domain": "example.com"},
        {"name": "__Host-a", "path": "/a"},
        {"name": "__host-a", "secure": False},
        {"name": "__Secure-a", "secure": False},
        {"same_site": "none", "secure": False},
        {"same_site": "Lax"},
        {"partitioned": True, "secure": False},
        {"path": "a"},
        {"path": "/;a"},
        {"domain": ""},
        {"domain": "a; Secure"},
        {"domain": "a\r\nb: c"},
    ],
)
def test_wrong_cookie_is_refused(settings: dict[str, Any]) -> None:
    """A cookie that browsers would reject is an error at construction."""
    with pytest.raises(ValueError, match=r"cookie|secure|same_site|path"):
        CookieTransport(**settings)


def test_header_carries_the_id() -> None:
    """The header has only the id, and cannot be cleared."""
    transport = HeaderTransport("Mcp-Session-Id")
    assert transport.read([(b"mcp-session-id", b"x")]) == "x"
    assert transport.read([(b"cookie", b"session=x")]) is None
    assert transport.issue("x", 60) == [(b"mcp-session-id", b"x")]
    assert list(transport.clear()) == []
    with pytest.raises(ValueError, match="token"):
        HeaderTransport("a b")
    assert repr(transport) == "HeaderTransport('Mcp-Session-Id')"
    assert "'session'" in repr(CookieTransport())
