"""The conditional writes, as scripts that run atomically on the server.

They are plain Lua 5.1 on one key with GETRANGE, GETEX, SET and DEL, so they work on Redis from 6.2
and on every Valkey, standalone and in a cluster. A native compare-and-set would not do:
`SET ... IFEQ` compares the whole value, not a revision, and exists on the newest servers only.

Each takes the caller's time, in milliseconds since the epoch, since a loaded session may outlive
its deadline on the server (see docs/stored-form.md), and whoever is past it is absent.
"""

import hashlib
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Script:
    """A Lua script and the digest that names it in a server's script cache."""

    source: bytes
    digest: bytes


def _script(source: str) -> Script:
    text = source.encode()
    # The digest that EVALSHA asks for; nothing depends on its strength.
    return Script(text, hashlib.sha1(text, usedforsecurity=False).hexdigest().encode())


WRITTEN: Final = 1
ABSENT: Final = 0
EXISTS: Final = -1
CHANGED: Final = -2
UNREADABLE: Final = -3

STORE: Final = _script("""
-- KEYS: the session's key.
-- ARGV: "absent", "present" or "unchanged"; the record; its TTL in milliseconds; the time, with 15
-- digits, so that as text it compares with deadlines; the format version and the expected revision.
local head = redis.call('GETRANGE', KEYS[1], 0, 31)

-- By far the most frequent case, first and in the fewest steps.
if string.sub(head, 1, 17) == ARGV[5] and string.sub(head, 18, 32) > ARGV[4]
    and ARGV[1] == 'unchanged' and #head == 32 and not string.find(head, '%D', 18) then
  redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3])
  return 1
end

-- What a read-only replica knows may be old, so it must not say "no". Without an option GETEX only
-- reads, but as it could write, a replica refuses it. It is not asked before SET: once a script
-- has run a command that could write, the server lets it exceed its memory limit.
local function refuse(status)
  if redis.call('GETEX', KEYS[1]) == '' then
    return -3
  end
  return status
end

if head == '' then
  if ARGV[1] == 'absent' and redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3], 'NX') then
    return 1
  end
  return refuse(0)
end
if #head < 32 or string.sub(head, 1, 1) ~= '1' or string.find(head, '%D', 18) then
  return refuse(-3)
end
-- Sent again because the reply was lost: it has been written already.
if string.sub(head, 2, 17) == string.sub(ARGV[2], 2, 17) then
  return 1
end
local found = string.sub(head, 18, 32) > ARGV[4]
if ARGV[1] == 'absent' then
  if found then
    return refuse(-1)
  end
elseif not found then
  return refuse(0)
elseif ARGV[1] == 'unchanged' then
  return refuse(-2)
end
redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3])
return 1
""")

DELETE: Final = _script("""
-- KEYS: the session's key. ARGV: the time, in milliseconds.
-- pcall: what is no string cannot be read, but can be deleted.
local head = redis.pcall('GETRANGE', KEYS[1], 0, 31)
if redis.call('DEL', KEYS[1]) == 0 then
  return 0
end
if type(head) == 'string' and #head == 32 and string.sub(head, 1, 1) == '1' then
  local deadline = tonumber(string.sub(head, 18, 32))
  if deadline and deadline <= tonumber(ARGV[1]) then
    return 0
  end
end
return 1
""")
