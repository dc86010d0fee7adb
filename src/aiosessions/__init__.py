"""Async session storage for proxies, gateways and services that run as several replicas."""

import logging

from .cache import CacheStatistics, NearCache
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
from .resources import ResourceStatistics, SessionResources
from .session import Session, SessionInfo, new_session_id, session_digest
from .storage import (
    AnnouncingStorage,
    Clock,
    IndexedStorage,
    Storage,
    StorageListener,
    When,
)

__all__ = [
    "AnnouncingStorage",
    "CacheStatistics",
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
    "NearCache",
    "RedisStatistics",
    "RedisStorage",
    "ResourceStatistics",
    "ServerHealth",
    "Session",
    "SessionConflict",
    "SessionError",
    "SessionExists",
    "SessionInfo",
    "SessionManager",
    "SessionNotFound",
    "SessionResources",
    "SessionRotated",
    "Storage",
    "StorageClosed",
    "StorageListener",
    "StorageMisused",
    "StorageUnavailable",
    "When",
    "new_session_id",
    "session_digest",
]

# Without a handler, an application that configures no logging would get bare lines on stderr.
logging.getLogger(__name__).addHandler(logging.NullHandler())
