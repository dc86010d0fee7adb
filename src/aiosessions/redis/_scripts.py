"""The conditional writes, as Lua scripts that run atomically on the server.

The scripts use Lua 5.1. They run on Redis 6.2 and later and on every Valkey. A native
compare-and-set would not do: `SET ... IFEQ` compares the whole value instead of the revision, and
only the newest servers have it.

In a cluster each script has one key. On one server, the script that writes a session of a principal
also writes the index of the principal, and looks at sessions that the index names. Their keys
cannot be known before, so they are not among the KEYS of the script, as a cluster would need them.

The scripts judge deadlines by the clock of the server, so that a replica of the service with a
wrong clock neither overwrites nor denies a live session. Each script takes an offset in
microseconds to add to that clock: 0, unless the storage got a clock.

Status codes: 1 written, deleted or alive; 0 absent; -1 exists; -2 changed; -3 unreadable; 2 not
written, because the index has to be written first.
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
NOT_INDEXED: Final = 2

PRELUDE: Final = f"""
local none = '{NO_DEADLINE}'

-- Milliseconds since the epoch.
local function now(offset)
  local time = redis.call('TIME')
  return (time[1] * 1000000 + time[2] + offset) / 1000
end

-- Whether the first 79 bytes of a value are the header of a record, at least.
local function is_record(head)
  local format = string.sub(head, 1, 1)
  local has_owner = (format == '2' or format == '3') and #head == 79
  return #head >= 32 and not string.find(string.sub(head, 18, 32), '%D')
    and (format == '1' or has_owner and not string.find(string.sub(head, 33, 47), '%D'))
end

local function is_dead(head, time)
  local deadline = string.sub(head, 18, 32)
  return deadline ~= none and tonumber(deadline) <= time
end

-- The digest of the principal; empty if there is none.
local function owner_of(head)
  return string.sub(head, 1, 1) == '1' and '' or string.sub(head, 48, 79)
end

-- Tell the caches that a session is being written, with its new revision, or deleted. Before the
-- change: if the user may not publish, nothing is changed.
local function announce(key, revision)
  redis.call('PUBLISH', string.sub(key, 1, -33) .. 'changes', string.sub(key, -32) .. revision)
end

-- Remove the entry of a session that was deleted, if one server has both.
local function forget(key, head, on_one_server)
  if on_one_server == '1' and is_record(head) and owner_of(head) ~= '' then
    local index = string.sub(key, 1, -33) .. 'principal:' .. owner_of(head)
    redis.pcall('ZREM', index, string.sub(key, -32))
  end
end
"""

# A lease lasts for three TTLs, and is extended once less than two are left.
INDEX_PRELUDE: Final = (
    PRELUDE
    + """
-- Remove the entries of dead sessions.
local function tidy(index, digests, prefix, owner)
  for _, digest in ipairs(digests) do
    local head = redis.pcall('GETRANGE', prefix .. digest, 0, 78)
    if type(head) ~= 'string' or head == '' or is_record(head) and owner_of(head) ~= owner then
      redis.call('ZREM', index, digest)
    end
  end
end

-- Add or confirm an entry, and return its lease.
local function enter(index, digest, time, lifetime)
  redis.call('ZADD', index, time, digest)
  if redis.call('PTTL', index) < lifetime then
    redis.call('PEXPIRE', index, string.format('%.0f', lifetime))
  end
  return string.format('%015.0f', math.floor(time + lifetime))
end
"""
)

_STORE = (
    INDEX_PRELUDE
    + """
-- KEYS: the session's key; for a session of a principal on one server, the key of the index.
-- ARGV: the condition; the record; its TTL in milliseconds; the clock offset; the revision to
-- replace; for a session of a principal in a cluster, its lease, or empty, and the milliseconds
-- that must be left of the lease.
local record, ttl, time = ARGV[2], tonumber(ARGV[3]), now(ARGV[4])
local head = ''
if ARGV[1] ~= 'always' then
  head = redis.call('GETRANGE', KEYS[1], 0, 78)
end

local function write(...)
  local deadline, px = string.sub(record, 18, 32), ARGV[3]
  if deadline ~= none then
    local left = tonumber(deadline) - time
    if left <= 0 then
      -- Only a delete is a delete: a key with a TTL of 1 ms could still be renewed.
      announce(KEYS[1], '')
      redis.call('DEL', KEYS[1])
      forget(KEYS[1], string.sub(record, 1, 79), KEYS[2] and '1')
      return 1
    elseif left < ttl then
      px = string.format('%.0f', math.ceil(left))
    end
  end
  local owner, lease, sample = owner_of(record), ARGV[6], {}
  if owner ~= '' then
    if lease and lease ~= '' then
      -- A command that arrives late may find its entry removed, because no session was there.
      if tonumber(lease) - time < tonumber(ARGV[7]) then
        return 2
      end
    else
      lease = nil
      if is_record(head) and owner_of(head) == owner then
        lease = string.sub(head, 33, 47)
        if tonumber(lease) - time < 2 * ttl then
          lease = nil
        end
      end
    end
    if not lease and not KEYS[2] then
      return 2
    end
  end
  announce(KEYS[1], string.sub(record, 2, 17))
  if owner ~= '' then
    if not lease then
      -- The entry first, so that no error leaves a session without one.
      sample = redis.call('ZRANDMEMBER', KEYS[2], 4)
      lease = enter(KEYS[2], string.sub(KEYS[1], -32), time, 3 * ttl)
    end
    record = string.sub(record, 1, 32) .. lease .. string.sub(record, 48)
  end
  if redis.call('SET', KEYS[1], record, 'PX', px, ...) then
    -- Last: once a script has removed an entry, the server lets it exceed the memory limit.
    tidy(KEYS[2], sample, string.sub(KEYS[1], 1, -33), owner)
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

if ARGV[1] == 'always' then
  return write()
end
if head == '' then
  -- An empty value has an empty head, too, which NX tells apart.
  if ARGV[1] == 'absent' then
    local status = write('NX')
    if status ~= 0 then
      return status
    end
  end
  return refuse(0)
end
if not is_record(head) then
  return refuse(-3)
end
-- The write was sent again because its reply was lost, and it is in place already.
if string.sub(head, 2, 17) == string.sub(record, 2, 17) then
  return 1
end
local dead = is_dead(head, time)
if ARGV[1] == 'absent' then
  if not dead then
    return refuse(-1)
  end
elseif dead then
  return refuse(0)
elseif ARGV[1] == 'unchanged' and string.sub(head, 2, 17) ~= ARGV[5] then
  return refuse(-2)
end
return write()
"""
)


class StoreScript:
    """The script of conditional writes, for sessions with and without a principal.

    Args:
        retryable: As for `Template`.

    Attributes:
        plain: For a session without a principal.
        owned: For a session of a principal on one server.
        leased: For a session of a principal in a cluster.
    """

    def __init__(self, *, retryable: bool) -> None:
        self.plain = Script(_STORE, 5, retryable=retryable)
        self.owned = Script(_STORE, 5, keys=2, retryable=retryable)
        self.leased = Script(_STORE, 7, retryable=retryable)


# Only a compare-and-set can be sent twice: it cannot succeed a second time.
STORE: Final = StoreScript(retryable=False)
STORE_UNCHANGED: Final = StoreScript(retryable=True)

DELETE: Final = Script(
    PRELUDE
    + """
-- KEYS: the session's key. ARGV: the clock offset; 1 on one server, 0 in a cluster.
-- pcall: a value that is not a string cannot be read, but it can be deleted.
local head = redis.pcall('GETRANGE', KEYS[1], 0, 78)
local dead = type(head) == 'string' and is_record(head) and is_dead(head, now(ARGV[1]))
if head ~= '' then -- else anyone could make all processes hear of ids that never existed
  announce(KEYS[1], '')
end
if redis.call('DEL', KEYS[1]) == 0 then
  return 0
end
if type(head) == 'string' then
  forget(KEYS[1], head, ARGV[2])
end
return dead and 0 or 1
""",
    2,
)

BURY: Final = Script(
    PRELUDE
    + """
-- Remove a record past its deadline, which a load has just renewed.
-- KEYS: the session's key. ARGV: the first 32 bytes of the record; the clock offset.
local head = redis.call('GETRANGE', KEYS[1], 0, 31)
if head == '' then
  return 0
elseif head ~= ARGV[1] then
  return -2
elseif not is_dead(head, now(ARGV[2])) then
  return 1
end
redis.call('DEL', KEYS[1])
return 0
""",
    2,
    retryable=True,
    writes=False,  # it removes only records that are gone for every caller
)

CONDITIONS: Final = {when: when.value.encode() for when in When}
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
