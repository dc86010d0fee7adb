"""Sessions in Redis or Valkey, through `redis.asyncio`.

The route of a load, from the top down:

- storage.py checks the id, fills GETEX with the key, and at the end decodes the record
  (`record.unseal`, which calls the codec).
- _routing.py picks the connection (_cluster.py: by the slot of the key), awaits the reply, and
  raises every error. _errors.py translates it.
- _connection.py queues the command and writes it, with the others of the same turn of the event
  loop. Its task connects through _driver.py, and again after a failure; _outage.py says who waits
  for that.
- _pipeline.py holds the commands in order, with their deadlines and bounds, and does no I/O.
- _channel.py parses the bytes that arrive; each reply resolves the future of the oldest command.
- _commands.py and _scripts.py list every command that is ever sent.

_announcements.py and _subscription.py hear of changes on connections of their own.
"""

from .health import RedisStatistics, ServerHealth
from .storage import RedisStorage

__all__ = ["RedisStatistics", "RedisStorage", "ServerHealth"]
