"""The scripts of the index of a principal's sessions.

An index is a sorted set. Its members are the digests of sessions, and the score of an entry is the
time at which it was added, or its lease was extended. An entry may name a session that is gone, but
no session is without an entry while the lease in its record lasts.
"""

from typing import Final

from ._commands import Script
from ._scripts import INDEX_PRELUDE, PRELUDE

_LIST: Final = (list,)

ENTER: Final = Script(
    INDEX_PRELUDE
    + """
-- Add or confirm an entry. Return its lease, and a sample of other entries, each with its score.
-- KEYS: the index. ARGV: the digest; the lifetime of the entry in milliseconds; the clock offset.
local sample = redis.call('ZRANDMEMBER', KEYS[1], 4, 'WITHSCORES')
return {enter(KEYS[1], ARGV[1], now(ARGV[3]), tonumber(ARGV[2])), sample}
""",
    3,
    replies=_LIST,
    retryable=True,
    writes=False,  # an entry without a session does no harm
)

ENTRIES: Final = Script(
    INDEX_PRELUDE
    + """
-- The entries, each with its score. On one server, those of dead sessions are removed first.
-- KEYS: the index. ARGV: the digest of the principal; the prefix of the sessions' keys, empty in a
-- cluster.
-- A replica may be out of date. It rejects this write, which does nothing.
redis.call('ZREMRANGEBYRANK', KEYS[1], 1, 0)
if ARGV[2] ~= '' then
  tidy(KEYS[1], redis.call('ZRANGE', KEYS[1], 0, -1), ARGV[2], ARGV[1])
end
return redis.call('ZRANGE', KEYS[1], 0, -1, 'WITHSCORES')
""",
    2,
    replies=_LIST,
    retryable=True,
    writes=False,
)

PRUNE: Final = Script(
    PRELUDE
    + """
-- Remove entries of dead sessions, in a cluster.
-- KEYS: the index. ARGV: the digests, each with its score; the age in milliseconds from which an
-- entry without a session is stale; the clock offset.
-- The session of a younger entry may be on its way. So may that of an entry with another score.
local time = now(ARGV[3])
for digest, score in string.gmatch(ARGV[1], '(%S+) (%S+)') do
  if redis.call('ZSCORE', KEYS[1], digest) == score and tonumber(score) <= time - ARGV[2] then
    redis.call('ZREM', KEYS[1], digest)
  end
end
return 1
""",
    3,
    retryable=True,
    writes=False,
)

_RENEW = (
    INDEX_PRELUDE
    + """
-- Write a new lease into a record, if the record was not written since.
-- KEYS: the session's key; on one server, the key of the index. ARGV: the revision; on one server,
-- the lifetime of an entry in milliseconds and the clock offset; in a cluster, the lease.
local head = redis.call('GETRANGE', KEYS[1], 0, 78)
if not is_record(head) or owner_of(head) == '' or string.sub(head, 2, 17) ~= ARGV[1] then
  return 0
end
local lease = ARGV[2]
if KEYS[2] then
  lease = enter(KEYS[2], string.sub(KEYS[1], -32), now(ARGV[3]), tonumber(ARGV[2]))
end
redis.call('SETRANGE', KEYS[1], 32, lease)
return 1
"""
)
RENEW: Final = Script(_RENEW, 3, keys=2, retryable=True, writes=False)
RENEW_LEASED: Final = Script(_RENEW, 2, retryable=True, writes=False)

REVOKE: Final = Script(
    PRELUDE
    + """
-- Delete a session of a principal: 1; -1 if the id was rotated away; 0 if there is none; -3 if the
-- record cannot be read.
-- KEYS: the session's key. ARGV: the digest of the principal; the clock offset; 1 on one server, 0
-- in a cluster.
local head = redis.pcall('GETRANGE', KEYS[1], 0, 78)
-- A replica may be out of date, and rejects this as a write, although it only reads.
if head == '' then
  return redis.call('GETEX', KEYS[1]) and -3 or 0
elseif type(head) ~= 'string' or not is_record(head) then
  return -3
elseif owner_of(head) ~= ARGV[1] then
  return 0
end
announce(KEYS[1], '')
redis.call('DEL', KEYS[1])
forget(KEYS[1], head, ARGV[3])
if is_dead(head, now(ARGV[2])) then
  return 0
end
return string.sub(head, 1, 1) == '3' and -1 or 1
""",
    3,
)

LOOK: Final = Script(
    PRELUDE
    + """
-- The moment at which a principal's session goes idle, in milliseconds. -1 if the id was
-- rotated away; 0 if there is none; -3 if the record cannot be read.
-- KEYS: the session's key. ARGV: the digest of the principal; the clock offset.
local head = redis.pcall('GETRANGE', KEYS[1], 0, 78)
if type(head) ~= 'string' or head ~= '' and not is_record(head) then
  return -3
elseif head == '' or owner_of(head) ~= ARGV[1] or is_dead(head, now(ARGV[2])) then
  return 0
end
if string.sub(head, 1, 1) == '3' then
  return -1
end
-- A moment, not a rest: two callers that look at different times get the same order.
return math.floor(now(ARGV[2])) + math.max(1, redis.call('PTTL', KEYS[1]))
""",
    2,
    retryable=True,
    writes=False,
)

TRIM: Final = Script(
    PRELUDE
    + """
-- Delete the longest-unused sessions of a principal, on one server, and return their number.
-- KEYS: the index. ARGV: the digest of the principal; the prefix of the sessions' keys; the number
-- of sessions to leave; the digest of the session to keep; the clock offset.
-- A replica may be out of date. It rejects this write, which does nothing.
redis.call('ZREMRANGEBYRANK', KEYS[1], 1, 0)
local time, live, others = now(ARGV[5]), 0, {}
for rank, digest in ipairs(redis.call('ZRANGE', KEYS[1], 0, -1)) do
  local key = ARGV[2] .. digest
  local head = redis.pcall('GETRANGE', key, 0, 78)
  if type(head) == 'string' and is_record(head) and owner_of(head) == ARGV[1]
    and string.sub(head, 1, 1) ~= '3' and not is_dead(head, time) then
    live = live + 1
    if digest ~= ARGV[4] then
      table.insert(others, {digest = digest, left = redis.call('PTTL', key), rank = rank})
    end
  end
end
-- Of sessions that were used in the same millisecond, the one that was entered first.
table.sort(others, function(one, other)
  return one.left < other.left or one.left == other.left and one.rank < other.rank
end)
local removed = math.min(#others, math.max(0, live - ARGV[3]))
for number = 1, removed do
  announce(ARGV[2] .. others[number].digest, '')
  redis.call('DEL', ARGV[2] .. others[number].digest)
  redis.call('ZREM', KEYS[1], others[number].digest)
end
return removed
""",
    5,
    retryable=True,  # another trim finds nothing left to delete
)
