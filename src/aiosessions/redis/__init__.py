"""Sessions in Redis or Valkey, through `redis.asyncio`."""

from .storage import RedisStorage

__all__ = ["RedisStorage"]
