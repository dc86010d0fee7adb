"""Async session storage for proxies, gateways and services that run as several replicas."""

import logging

from .codec import Codec, JsonCodec, MsgpackCodec
from .encryption import EncryptedCodec
from .errors import (
    CorruptSession,
    InvalidSession,
    InvalidSessionId,
    SessionConflict,
    SessionError,
    SessionExists,
    SessionNotFound,
    SessionRotated,
    StorageClosed,
    StorageMisused,
    StorageUnavailable,
)
from .local import LocalStatistics, LocalStorage
from .manager import SessionManager
from .redis import RedisStatistics, RedisStorage, ServerHealth
from .session import Session, SessionInfo, new_session_id, session_digest
from .storage import Clock, IndexedStorage, Storage, When

__all__ = [
    "Clock",
    "Codec",
    "CorruptSession",
    "EncryptedCodec",
    "IndexedStorage",
    "InvalidSession",
    "InvalidSessionId",
    "JsonCodec",
    "LocalStatistics",
    "LocalStorage",
    "MsgpackCodec",
    "RedisStatistics",
    "RedisStorage",
    "ServerHealth",
    "Session",
    "SessionConflict",
    "SessionError",
    "SessionExists",
    "SessionInfo",
    "SessionManager",
    "SessionNotFound",
    "SessionRotated",
    "Storage",
    "StorageClosed",
    "StorageMisused",
    "StorageUnavailable",
    "When",
    "new_session_id",
    "session_digest",
]

# Without a handler, an application that configures no logging would get bare lines on stderr.
logging.getLogger(__name__).addHandler(logging.NullHandler())
