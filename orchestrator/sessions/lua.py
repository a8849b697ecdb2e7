"""Redis layout of a session, and the atomic scripts that read and write it.

Hash `{prefix}:session:{id}`:

- `version` of this layout (missing: 1), `model`, `created_by` (owner of the first lease);
- `epoch`: of the last lease;
- `lease_epoch`, `owner`, `lease_until` (microseconds of Redis' clock): only while leased;
  `resumes`: only while leased by a takeover;
- `num_tokens`, `num_turns`, and the counters `num_drafts`, `num_draft_tokens`,
  `num_accepted_tokens`, `num_emitted_tokens`;
- `turn_epoch`: of the last turn's holder; `begun_by`: the epoch that begin_turn was called with;
- `orphan`: the epoch of a holder that lost its lease before it began a turn (below);
- `target_kv`, `draft_kv`, `messages`, `turn`: encoded and decoded by `codec`.

No script changes other fields. String `{prefix}:session:{id}:tokens`: the committed token ids,
uint32 little-endian. Both keys share a hash slot.

A reply is an array; its first item is the status. Each script may run twice: when a reply is lost,
the same command is sent again.

**Malformed records.** A field in NUMBERS that is not an integer below 2^53 (the limit of exact Lua
numbers) makes the session unreadable: scripts that read the session or begin a turn return
`malformed` and its name, and write nothing. The other writes of a holder check `num_tokens` only.
DELETE and a deleting RELEASE delete the session all the same.

**Epochs** are fencing tokens: a later lease has a higher epoch, even if the session was deleted or
Redis lost its data. Hence the clock: microseconds since 1970 stay below 2^53 until 2255.

**Orphans.** A holder may run while Redis is away and lose its lease before its turn is begun here.
It may still begin the turn while nobody holds the session, as long as no later holder has begun
one. So no turn is ever overwritten by an earlier one. A takeover that finds no turn to resume
leaves the orphan as it is. A later turn replaces it.

**Session limits.** The scripts also keep the client's set of sessions complete, and alive as long
as any session in it (`orchestrator.admission.session_limit`). A Redis cluster has no such set.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

# Increase it for a change behind which older orchestrators must not write. An added field that may
# be missing, and that they may leave unchanged, is no such change.
VERSION = 1
# Sorted set of a client's session keys (`orchestrator.admission.session_limit`).
SESSIONS_KEY = "outrider:key:{%s}:sessions"
NUMBERS = (
    "version", "epoch", "lease_epoch", "lease_until", "num_tokens", "num_turns", "turn_epoch",
    "begun_by", "orphan", "num_drafts", "num_draft_tokens", "num_accepted_tokens",
    "num_emitted_tokens",
)  # fmt: skip

_PRELUDE = """
local key, tokens_key = KEYS[1], KEYS[2]

-- Lua prints only 14 digits of a number; epochs have 16.
local function digits(n) return string.format('%.0f', n) end

local function is_number(value)
  return value and #value <= 16 and string.find(value, '^%d+$') ~= nil and tonumber(value) < 2^53
end

local function now_us()
  local t = redis.call('TIME')
  return t[1] * 1000000 + t[2]
end

-- Extends the life of key `name` if it would end within `ttl_ms`.
local function outlive(name, ttl_ms)
  local left_ms = redis.pcall('PTTL', name)
  if type(left_ms) == 'number' and left_ms < tonumber(ttl_ms) then
    redis.call('PEXPIRE', name, digits(2 * ttl_ms))
  end
end

-- nil for the session of an unnamed client.
local client = string.match(key, '{([^/}]+)/')
local sessions_key = client and string.format(SESSIONS_KEY, client)

-- A leased session lives at least as long as its lease.
local function expire(session_ttl_ms, lease_us)
  local ttl_ms = digits(math.max(session_ttl_ms, math.ceil((lease_us or 0) / 1000)))
  redis.call('PEXPIRE', key, ttl_ms)
  redis.call('PEXPIRE', tokens_key, ttl_ms)
  if sessions_key then outlive(sessions_key, ttl_ms) end
end

-- Counts a session that existed before this call. The creator of a session has counted it already.
local function count(session_ttl_ms)
  if not sessions_key then return end
  redis.pcall('ZADD', sessions_key, digits(now_us() + session_ttl_ms * 1000), key)
end

-- The reply for a session of a newer layout, or a malformed one; nil for all others.
local function unreadable()
  local values = redis.call('HMGET', key, unpack(NUMBERS))
  if is_number(values[1]) and tonumber(values[1]) > VERSION then return {'newer', values[1]} end
  for i, name in ipairs(NUMBERS) do
    if values[i] and not is_number(values[i]) then return {'malformed', name} end
  end
  local needed = redis.call('HMGET', key, 'num_tokens', 'model')
  if needed[1] and not needed[2] then return {'incomplete', 'model'} end
end

-- The reply that refuses a write with this epoch; nil if it may write. 'gone': also if only the
-- tokens are. 'later': an orphan that may not write now.
local function refusal(epoch, may_begin)
  local held = redis.call('HMGET', key, 'lease_epoch', 'epoch', 'num_tokens', 'orphan')
  if not held[2] or not held[3] then return {'gone'} end
  if held[1] ~= epoch then
    if not may_begin or held[4] ~= epoch then return {'fenced'} end
    if held[1] then return {'later'} end
  end
  if not is_number(held[3]) then return {'malformed', 'num_tokens'} end
  if held[3] * 4 > redis.call('STRLEN', tokens_key) then return {'gone'} end
end

-- Number of bytes of the committed tokens. Cuts off bytes behind them, left by a script that failed
-- in the middle: Redis does not roll back.
local function committed()
  local have = redis.call('HGET', key, 'num_tokens') * 4
  if redis.call('STRLEN', tokens_key) > have then
    local tokens = have > 0 and redis.call('GETRANGE', tokens_key, 0, have - 1) or ''
    redis.call('SET', tokens_key, tokens, 'KEEPTTL')
  end
  return have
end

-- A malformed lease counts as none.
local function in_use()
  local until_us = redis.call('HGET', key, 'lease_until')
  return is_number(until_us) and tonumber(until_us) > now_us()
end

-- {remaining ms, in use, hash, tokens} of a readable session; false if it does not exist or one of
-- its keys was evicted.
local function snapshot()
  local num_tokens = redis.call('HGET', key, 'num_tokens')
  if not num_tokens or num_tokens * 4 > redis.call('STRLEN', tokens_key) then return false end
  local size = num_tokens * 4
  local tokens = size > 0 and redis.call('GETRANGE', tokens_key, 0, size - 1) or ''
  return {redis.call('PTTL', key), in_use() and 1 or 0, redis.call('HGETALL', key), tokens}
end
"""


@dataclass(frozen=True)
class Script:
    """A Lua script after the prelude above, which names its two KEYS `key` and `tokens_key`."""

    body: str
    source: bytes = field(init=False, repr=False)
    sha: bytes = field(init=False)

    def __post_init__(self) -> None:
        numbers = ", ".join(f"'{name}'" for name in NUMBERS)
        values = f"{VERSION}, '{SESSIONS_KEY}', {{{numbers}}}"
        constants = f"local VERSION, SESSIONS_KEY, NUMBERS = {values}\n"
        source = (constants + _PRELUDE + self.body).encode()
        object.__setattr__(self, "source", source)
        # Redis names scripts by SHA-1; no secret depends on it.
        digest = hashlib.sha1(source, usedforsecurity=False).hexdigest()
        object.__setattr__(self, "sha", digest.encode())


# ARGV: owner, create, takeover, model, lease_us, session_ttl_ms. Reply: ok epoch created snapshot.
# A takeover fences the former holder. The last turn belongs to the new holder, hence its epoch.
ACQUIRE = Script("""
local owner, create, takeover, model, lease_us, session_ttl_ms = unpack(ARGV)
local now = now_us()
local refused = unreadable()
if refused then return refused end
local seen = snapshot()
if not seen then
  if create ~= '1' then return {'not_found'} end
  -- Only if needed: after its first write Redis lets a script exceed maxmemory.
  if redis.call('EXISTS', key, tokens_key) > 0 then redis.call('DEL', key, tokens_key) end
  redis.call('HSET', key, 'version', VERSION, 'model', model, 'num_tokens', 0,
             'created_by', owner)
  seen = snapshot()
end
local had = redis.call('HMGET', key, 'model', 'epoch', 'owner', 'created_by', 'turn_epoch',
                       'lease_epoch', 'orphan', 'resumes')
if had[1] ~= model then return {'other_model', had[1], model} end
local epoch = had[2]
if had[3] ~= owner then  -- equal: this call was sent twice
  if seen[2] == 1 and takeover ~= '1' then return {'in_use'} end
  if had[6] and had[5] ~= had[2] and not (had[7] and had[8]) then
    redis.call('HSET', key, 'orphan', had[6])
  end
  epoch = digits(math.max(now, (tonumber(epoch) or 0) + 1))
  if takeover == '1' and had[5] and had[5] == had[2] then
    redis.call('HSET', key, 'turn_epoch', epoch)
  end
end
redis.call('HSET', key, 'epoch', epoch, 'lease_epoch', epoch, 'owner', owner,
           'lease_until', digits(now + lease_us))
if takeover == '1' then
  redis.call('HSET', key, 'resumes', 1)
else
  redis.call('HDEL', key, 'resumes')
end
if had[4] ~= owner then count(session_ttl_ms) end
expire(session_ttl_ms, lease_us)
return {'ok', epoch, had[4] == owner and 1 or 0, seen}
""")

# ARGV: epoch, previous bytes, kept bytes, tokens, messages, turn, lease_us, session_ttl_ms.
BEGIN_TURN = Script("""
local epoch, previous, kept, tokens, messages, turn, lease_us, session_ttl_ms = unpack(ARGV)
previous, kept = tonumber(previous), tonumber(kept)
local refused = refusal(epoch, true) or unreadable()
if refused then return refused end
local have = committed()
if redis.call('HGET', key, 'begun_by') == epoch then
  if have ~= kept + #tokens or redis.call('GETRANGE', tokens_key, kept, -1) ~= tokens then
    return {'mismatch', have / 4}
  end
else
  if have ~= previous or kept > have then return {'mismatch', have / 4} end
  -- First: if a later command fails, all counted tokens exist.
  redis.call('HSET', key, 'num_tokens', kept / 4)
  if kept == 0 then
    redis.call('SET', tokens_key, tokens)
  else
    if kept < have then
      redis.call('SET', tokens_key, redis.call('GETRANGE', tokens_key, 0, kept - 1))
    end
    redis.call('APPEND', tokens_key, tokens)
  end
  redis.call('HINCRBY', key, 'num_turns', 1)
end
redis.call('HDEL', key, 'orphan')
-- The epoch of the last lease, also if an earlier holder begins its turn: no later turn exists.
redis.call('HSET', key, 'turn_epoch', redis.call('HGET', key, 'epoch'), 'begun_by', epoch,
           'lease_epoch', epoch, 'num_tokens', (kept + #tokens) / 4,
           'messages', messages, 'turn', turn, 'lease_until', digits(now_us() + lease_us))
expire(session_ttl_ms, lease_us)
return {'ok'}
""")

# ARGV: epoch, previous bytes, tokens, four counters (totals), target_kv, draft_kv, lease_us,
# session_ttl_ms. Tokens that are stored already, all or the first of them, are not appended again.
RECORD = Script("""
local previous, tokens = tonumber(ARGV[2]), ARGV[3]
local refused = refusal(ARGV[1])
if refused then return refused end
local have = committed()
local repeated = have - previous
if repeated ~= 0 then
  if repeated < 0 or repeated > #tokens
     or redis.call('GETRANGE', tokens_key, previous, -1) ~= string.sub(tokens, 1, repeated) then
    return {'mismatch', have / 4}
  end
  tokens = string.sub(tokens, repeated + 1)
end
redis.call('APPEND', tokens_key, tokens)
redis.call('HSET', key, 'num_tokens', (have + #tokens) / 4,
           'num_drafts', ARGV[4], 'num_draft_tokens', ARGV[5], 'num_accepted_tokens', ARGV[6],
           'num_emitted_tokens', ARGV[7], 'target_kv', ARGV[8], 'draft_kv', ARGV[9],
           'lease_until', digits(now_us() + ARGV[10]))
expire(ARGV[11], ARGV[10])
return {'ok'}
""")

# ARGV: epoch, lease_us, session_ttl_ms.
RENEW = Script("""
local refused = refusal(ARGV[1], true)
if refused then return refused end
if redis.call('HGET', key, 'lease_epoch') ~= ARGV[1] then return {'later'} end
redis.call('HSET', key, 'lease_until', digits(now_us() + ARGV[2]))
expire(ARGV[3], ARGV[2])
return {'ok'}
""")

# ARGV: epoch, target_kv, draft_kv, messages ('' leaves them unchanged), delete, session_ttl_ms.
RELEASE = Script("""
local epoch, target_kv, draft_kv, messages, delete, session_ttl_ms = unpack(ARGV)
local refused = refusal(epoch)
if delete == '1' and (not refused or refused[1] == 'gone' or refused[1] == 'malformed') then
  redis.call('DEL', key, tokens_key)
  return {'ok'}
end
if refused then
  local had = redis.call('HMGET', key, 'lease_epoch', 'epoch', 'begun_by')
  if not had[1] and (had[2] == epoch or had[3] == epoch) then return {'ok'} end  -- sent twice
  return refused
end
redis.call('HDEL', key, 'lease_epoch', 'owner', 'lease_until', 'resumes')
redis.call('HSET', key, 'target_kv', target_kv, 'draft_kv', draft_kv)
if messages ~= '' then redis.call('HSET', key, 'messages', messages) end
expire(session_ttl_ms)
return {'ok'}
""")

GET = Script("""
local refused = unreadable()
if refused then return refused end
local seen = snapshot()
return seen and {'ok', seen} or {'not_found'}
""")

# A malformed session counts as existing; its tokens may be of another type.
DELETE = Script("""
local refused = unreadable()
if refused and refused[1] == 'newer' then return refused end
local num_tokens, size = redis.call('HGET', key, 'num_tokens'), redis.pcall('STRLEN', tokens_key)
if not refused and (not num_tokens or type(size) == 'number' and num_tokens * 4 > size) then
  return {'not_found'}
end
if in_use() then return {'in_use'} end
redis.call('DEL', key, tokens_key)
return {'ok'}
""")

SCRIPTS = (ACQUIRE, BEGIN_TURN, RECORD, RENEW, RELEASE, GET, DELETE)
