"""Sessions for web applications: pure ASGI, for Starlette, FastAPI, Litestar, Quart and others."""

from ._middleware import SessionMiddleware, get_session
from ._transport import CookieTransport, HeaderTransport, Transport
from ._web import WebSession

__all__ = [
    "CookieTransport",
    "HeaderTransport",
    "SessionMiddleware",
    "Transport",
    "WebSession",
    "get_session",
]
