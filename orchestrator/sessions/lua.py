"""The writes to a session, each one atomic script. Knows the layout; the other half is `codec`.

Hash `{prefix}:session:{id}`:
  version (of this layout; none is 1), model, epoch (last given), lease_epoch + owner + lease_until
  (while leased; microseconds of Redis' own clock), resumes (while leased by a takeover),
  created_by, num_tokens, num_turns, turn_epoch (epoch of the last turn's holder), begun_by (epoch
  that its begin_turn came with), orphan (below), the four counters, target_kv, draft_kv, messages,
  turn. Other fields stay.
String `{prefix}:session:{id}:tokens`: the committed ids, uint32 little-endian.

Every script may be sent twice: a reply lost on the way is answered by sending again. A reply is an
array whose first item is its status. The two keys share a hash slot. Beside them scripts touch only
the count of a caller's sessions (`session_places`): it lives at least as long as each of them, and
a session that is used is in it, also where Redis has lost it. In a cluster there is no such count.

Epochs are fencing tokens: later leases have higher ones, also across deletion, expiry and a Redis
that lost its data, hence the clock. Microseconds since 1970 stay below 2^53 (a Lua number) until
2255; Lua prints only 14 digits of its own accord, hence the format.

A holder whose lease was taken before it began its turn here, having run while Redis was away, is
the session's orphan. Its turn may still be begun, once nobody holds the session and as long as no
later holder has begun one: so nothing of a later one is ever written over. A takeover that finds
nothing to go on with leaves the orphan as it is; a later turn takes its place.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

# Grows with a change that older orchestrators must not write behind. A field that they may leave as
# it is, and that may be missing, is none.
VERSION = 1
# A caller's sorted set of sessions (`orchestrator.admission.session_limit`), by the caller's name.
PLACES_KEY = "outrider:key:{%s}:sessions"

_PRELUDE = """
local key, tokens_key = KEYS[1], KEYS[2]

local function digits(n) return string.format('%.0f', n) end

local function now_us()
  local t = redis.call('TIME')
  return t[1] * 1000000 + t[2]
end

local function outlive(name, ttl_ms)
  local left_ms = redis.pcall('PTTL', name)
  if type(left_ms) == 'number' and left_ms < tonumber(ttl_ms) then
    redis.call('PEXPIRE', name, digits(2 * ttl_ms))
  end
end

-- Of a session whose caller has a name.
local caller = string.match(key, '{([^/}]+)/')
local places_key = caller and string.format(PLACES_KEY, caller)

-- While it is leased, a session lives at least as long as its lease.
local function expire(session_ttl_ms, lease_us)
  local ttl_ms = digits(math.max(session_ttl_ms, math.ceil((lease_us or 0) / 1000)))
  redis.call('PEXPIRE', key, ttl_ms)
  redis.call('PEXPIRE', tokens_key, ttl_ms)
  if places_key then outlive(places_key, ttl_ms) end
end

-- A session that was there before this call counts; who makes one has counted it.
local function count(session_ttl_ms)
  if not places_key then return end
  redis.pcall('ZADD', places_key, digits(now_us() + session_ttl_ms * 1000), key)
end

-- The version of a session whose layout is newer than VERSION; nil otherwise.
local function newer()
  local version = redis.call('HGET', key, 'version')
  if version and tonumber(version) > VERSION then return version end
  return nil
end

-- Why a holder of this epoch may not write; nil if it may. A session without its tokens is gone.
-- 'later': an orphan that may not write now.
local function refusal(epoch, may_begin)
  local held = redis.call('HMGET', key, 'lease_epoch', 'epoch', 'num_tokens', 'orphan')
  if not held[2] then return 'gone' end
  if held[1] ~= epoch then
    if not may_begin or held[4] ~= epoch then return 'fenced' end
    if held[1] then return 'later' end
  end
  if (tonumber(held[3]) or 0) * 4 > redis.call('STRLEN', tokens_key) then return 'gone' end
  return nil
end

-- The bytes of the committed tokens. What is behind them a script has left that was cut short, by
-- an error in the midst of it: Redis takes nothing back.
local function committed()
  local have = redis.call('HGET', key, 'num_tokens') * 4
  if redis.call('STRLEN', tokens_key) > have then
    local tokens = ''
    if have > 0 then tokens = redis.call('GETRANGE', tokens_key, 0, have - 1) end
    redis.call('SET', tokens_key, tokens, 'KEEPTTL')
  end
  return have
end

-- false, or {remaining ms, in use, hash, tokens}. A session one of whose keys was evicted is none.
local function snapshot()
  local num_tokens = redis.call('HGET', key, 'num_tokens')
  if not num_tokens then return false end
  if num_tokens * 4 > redis.call('STRLEN', tokens_key) then return false end
  local until_us = redis.call('HGET', key, 'lease_until')
  local in_use, tokens = 0, ''
  if until_us and tonumber(until_us) > now_us() then in_use = 1 end
  if tonumber(num_tokens) > 0 then
    tokens = redis.call('GETRANGE', tokens_key, 0, num_tokens * 4 - 1)
  end
  return {redis.call('PTTL', key), in_use, redis.call('HGETALL', key), tokens}
end
"""


@dataclass(frozen=True)
class Script:
    body: str
    source: bytes = field(init=False, repr=False)
    sha: bytes = field(init=False)

    def __post_init__(self) -> None:
        names = f"local VERSION, PLACES_KEY = {VERSION}, '{PLACES_KEY}'\n"
        source = (names + _PRELUDE + self.body).encode()
        object.__setattr__(self, "source", source)
        # Redis names scripts by SHA-1; no secret depends on it.
        digest = hashlib.sha1(source, usedforsecurity=False).hexdigest()
        object.__setattr__(self, "sha", digest.encode())


# owner, create, takeover, model, lease_us, session_ttl_ms -> ok epoch created snapshot
# A takeover asks nobody: the former holder is fenced from now on. The last turn is then the new
# holder's to go on with, hence its epoch.
ACQUIRE = Script("""
local owner, create, takeover, model, lease_us, session_ttl_ms = unpack(ARGV)
local now = now_us()
if newer() then return {'newer', newer()} end
local seen = snapshot()
if not seen then
  if create ~= '1' then return {'not_found'} end
  -- Not always: after a first write Redis lets a script exceed maxmemory.
  if redis.call('EXISTS', key, tokens_key) > 0 then redis.call('DEL', key, tokens_key) end
  redis.call('HSET', key, 'version', VERSION, 'model', model, 'num_tokens', 0,
             'created_by', owner)
  seen = snapshot()
end
local had = redis.call('HMGET', key, 'model', 'epoch', 'owner', 'created_by', 'turn_epoch',
                       'lease_epoch', 'orphan', 'resumes')
if had[1] ~= model then return {'other_model', had[1]} end
local epoch = had[2]
if had[3] ~= owner then  -- equal: this very call, sent again
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

# epoch, previous bytes, kept bytes, tokens, messages, turn, lease_us, session_ttl_ms
BEGIN_TURN = Script("""
local epoch, previous, kept, tokens, messages, turn, lease_us, session_ttl_ms = unpack(ARGV)
previous, kept = tonumber(previous), tonumber(kept)
local why = refusal(epoch, true)
if why then return {why} end
local have = committed()
if redis.call('HGET', key, 'begun_by') == epoch then
  if have ~= kept + #tokens or redis.call('GETRANGE', tokens_key, kept, -1) ~= tokens then
    return {'mismatch', have / 4}
  end
else
  if have ~= previous or kept > have then return {'mismatch', have / 4} end
  -- First: should a later command fail, what is counted is there.
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
-- Of the last lease given, also where this is an earlier one's turn: there is no later turn.
redis.call('HSET', key, 'turn_epoch', redis.call('HGET', key, 'epoch'), 'begun_by', epoch,
           'lease_epoch', epoch, 'num_tokens', (kept + #tokens) / 4,
           'messages', messages, 'turn', turn, 'lease_until', digits(now_us() + lease_us))
expire(session_ttl_ms, lease_us)
return {'ok'}
""")

# epoch, previous bytes, tokens, four counters (totals), target_kv, draft_kv, lease_us,
# session_ttl_ms. Tokens already there, all or the first of them, are not appended again.
RECORD = Script("""
local previous, tokens = tonumber(ARGV[2]), ARGV[3]
local why = refusal(ARGV[1])
if why then return {why} end
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

# epoch, lease_us, session_ttl_ms
RENEW = Script("""
local why = refusal(ARGV[1], true)
if why then return {why} end
if redis.call('HGET', key, 'lease_epoch') ~= ARGV[1] then return {'later'} end
redis.call('HSET', key, 'lease_until', digits(now_us() + ARGV[2]))
expire(ARGV[3], ARGV[2])
return {'ok'}
""")

# epoch, target_kv, draft_kv, messages ('' as they are), delete, session_ttl_ms
RELEASE = Script("""
local epoch, target_kv, draft_kv, messages, delete, session_ttl_ms = unpack(ARGV)
local why = refusal(epoch)
if why == 'gone' and delete == '1' then
  redis.call('DEL', key, tokens_key)
  return {'ok'}
end
if why then
  local had = redis.call('HMGET', key, 'lease_epoch', 'epoch', 'begun_by')
  if not had[1] and (had[2] == epoch or had[3] == epoch) then return {'ok'} end  -- sent again
  return {why}
end
if delete == '1' then
  redis.call('DEL', key, tokens_key)
  return {'ok'}
end
redis.call('HDEL', key, 'lease_epoch', 'owner', 'lease_until', 'resumes')
redis.call('HSET', key, 'target_kv', target_kv, 'draft_kv', draft_kv)
if messages ~= '' then redis.call('HSET', key, 'messages', messages) end
expire(session_ttl_ms)
return {'ok'}
""")

GET = Script("""
if newer() then return {'newer', newer()} end
local seen = snapshot()
if not seen then return {'not_found'} end
return {'ok', seen}
""")

SUMMARY = Script("""
local had = redis.call('HMGET', key, 'num_tokens', 'num_turns', 'lease_until')
if not had[1] then return {'not_found'} end
local until_us = tonumber(had[3] or '')
local in_use = until_us and until_us > now_us()
return {'ok', redis.call('PTTL', key), in_use and 1 or 0, had[1], had[2] or '0'}
""")

DELETE = Script("""
if newer() then return {'newer', newer()} end
local seen = snapshot()
if not seen then return {'not_found'} end
if seen[2] == 1 then return {'in_use'} end
redis.call('DEL', key, tokens_key)
return {'ok', seen}
""")

# Of no session: whether Redis takes writes now. Leaves nothing.
PROBE = Script("""
redis.call('HSET', key, 'at', digits(now_us()))
redis.call('DEL', key)
return {'ok'}
""")

SCRIPTS = (ACQUIRE, BEGIN_TURN, RECORD, RENEW, RELEASE, GET, SUMMARY, DELETE, PROBE)
