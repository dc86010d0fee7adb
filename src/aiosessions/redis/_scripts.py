"""The conditional writes, as Lua scripts that run atomically on the server.

The scripts use Lua 5.1, one key, and GETRANGE, GETEX, SET, DEL and TIME. They run on Redis 6.2 and
later and on every Valkey, standalone and in a cluster. A native compare-and-set would not do: `SET
... IFEQ` compares the whole value instead of the revision, and only the newest servers have it.

The scripts judge deadlines by the clock of the server, so that a replica of the service with a
wrong clock neither overwrites nor denies a live session. Each script takes an offset in
microseconds to add to that clock: 0, unless the storage got a clock.

Status codes: 1 written, deleted or alive; 0 absent; -1 exists; -2 changed; -3 unreadable.
"""

from typing import Any, Final

from ..errors import (
    CorruptSession,
    SessionConflict,
    SessionError,
    SessionExists,
    SessionNotFound,
    StorageUnavailable,
)
from ..record import CHANGED as CHANGED_TEXT
from ..record import EXISTS as EXISTS_TEXT
from ..record import NO_DEADLINE, NOT_FOUND
from ..storage import When
from ._commands import Script

DONE: Final = 1
ABSENT: Final = 0
EXISTS: Final = -1
CHANGED: Final = -2
UNREADABLE: Final = -3

_PRELUDE = f"""
local none = '{NO_DEADLINE}'

-- Milliseconds since the epoch.
local function now(offset)
  local time = redis.call('TIME')
  return (time[1] * 1000000 + time[2] + offset) / 1000
end
"""

_STORE = (
    _PRELUDE
    + """
-- KEYS: the session's key. ARGV: "absent", "present" or "unchanged"; the record; its TTL in
-- milliseconds; the clock offset; the format version and the expected revision.
local head = redis.call('GETRANGE', KEYS[1], 0, 31)

local function write(...)
  local deadline = string.sub(ARGV[2], 18, 32)
  local ttl = ARGV[3]
  if deadline ~= none then
    local left = tonumber(deadline) - now(ARGV[4])
    if left <= 0 then
      -- Only a delete is a delete: a key with a TTL of 1 ms could still be renewed.
      redis.call('DEL', KEYS[1])
      return 1
    elseif left < tonumber(ttl) then
      ttl = string.format('%.0f', math.ceil(left))
    end
  end
  if redis.call('SET', KEYS[1], ARGV[2], 'PX', ttl, ...) then
    return 1
  end
  return 0
end

-- A replica may be out of date, so it must not refuse a write. GETEX without an option only reads,
-- but a replica rejects it, as it rejects a write. It runs only where nothing is written: once a
-- script has run such a command, the server lets the script exceed the memory limit.
local function refuse(status)
  if redis.call('GETEX', KEYS[1]) == '' then
    return -3
  end
  return status
end

if head == '' then
  -- An empty value has an empty head, too, which NX tells apart.
  if ARGV[1] == 'absent' and write('NX') == 1 then
    return 1
  end
  return refuse(0)
end
if #head < 32 or string.sub(head, 1, 1) ~= '1' or string.find(head, '%D', 18) then
  return refuse(-3)
end
-- The write was sent again because its reply was lost, and it is in place already.
if string.sub(head, 2, 17) == string.sub(ARGV[2], 2, 17) then
  return 1
end
local deadline = string.sub(head, 18, 32)
local found = deadline == none or tonumber(deadline) > now(ARGV[4])
if ARGV[1] == 'absent' then
  if found then
    return refuse(-1)
  end
elseif not found then
  return refuse(0)
elseif ARGV[1] == 'unchanged' and string.sub(head, 1, 17) ~= ARGV[5] then
  return refuse(-2)
end
return write()
"""
)

# Only a compare-and-set can be sent twice: it cannot succeed a second time.
STORE: Final = Script(_STORE, 5)
STORE_UNCHANGED: Final = Script(_STORE, 5, retryable=True)

DELETE: Final = Script(
    _PRELUDE
    + """
-- KEYS: the session's key. ARGV: the clock offset.
-- pcall: a value that is not a string cannot be read, but it can be deleted.
local head = redis.pcall('GETRANGE', KEYS[1], 0, 31)
local dead = false
if type(head) == 'string' and string.find(head, '^1................%d+$') and #head == 32 then
  local deadline = string.sub(head, 18, 32)
  dead = deadline ~= none and tonumber(deadline) <= now(ARGV[1])
end
if redis.call('DEL', KEYS[1]) == 0 or dead then
  return 0
end
return 1
""",
    1,
)

BURY: Final = Script(
    _PRELUDE
    + """
-- Remove a record past its deadline, which a load has just renewed.
-- KEYS: the session's key. ARGV: the header of the record; the clock offset.
local head = redis.call('GETRANGE', KEYS[1], 0, 31)
if head == '' then
  return 0
elseif head ~= ARGV[1] then
  return -2
elseif tonumber(string.sub(head, 18, 32)) > now(ARGV[2]) then
  return 1
end
redis.call('DEL', KEYS[1])
return 0
""",
    2,
    retryable=True,
    writes=False,  # it removes only records that are gone for every caller
)

CONDITIONS: Final = {
    When.ABSENT: b"absent",
    When.PRESENT: b"present",
    When.UNCHANGED: b"unchanged",
}
_REFUSALS: Final[dict[int, tuple[type[SessionError], str]]] = {
    ABSENT: (SessionNotFound, NOT_FOUND),
    EXISTS: (SessionExists, EXISTS_TEXT),
    CHANGED: (SessionConflict, CHANGED_TEXT),
    UNREADABLE: (CorruptSession, "the record under this id cannot be read"),
}


def refusal(status: Any) -> SessionError:
    """The error for the status of a conditional write that was not applied."""
    if status not in _REFUSALS:
        return unfit(in_doubt=True)
    kind, message = _REFUSALS[status]
    return kind(message)


def unfit(*, in_doubt: bool) -> StorageUnavailable:
    """The error for a reply that no script gives."""
    return StorageUnavailable("the server's answer does not fit the command", in_doubt=in_doubt)
