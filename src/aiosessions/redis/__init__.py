"""Sessions in Redis or Valkey, through `redis.asyncio`."""

from .health import ServerHealth
from .storage import RedisStorage

__all__ = ["RedisStorage", "ServerHealth"]
