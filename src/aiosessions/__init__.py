"""Async session storage for proxies, gateways and services that run as several replicas."""

import logging

from .codec import Codec, JsonCodec, MsgpackCodec
from .errors import (
    CorruptSession,
    InvalidSession,
    SessionConflict,
    SessionError,
    SessionExists,
    SessionNotFound,
    StorageClosed,
    StorageUnavailable,
)
from .local import LocalStorage
from .manager import SessionManager
from .redis import RedisStorage
from .session import Session, new_session_id
from .storage import Clock, Storage, When

__all__ = [
    "Clock",
    "Codec",
    "CorruptSession",
    "InvalidSession",
    "JsonCodec",
    "LocalStorage",
    "MsgpackCodec",
    "RedisStorage",
    "Session",
    "SessionConflict",
    "SessionError",
    "SessionExists",
    "SessionManager",
    "SessionNotFound",
    "Storage",
    "StorageClosed",
    "StorageUnavailable",
    "When",
    "new_session_id",
]

# Without one, an application that configures no logging would get bare lines on stderr.
logging.getLogger(__name__).addHandler(logging.NullHandler())
