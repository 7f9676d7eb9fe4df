"""Lua scripts that change several keys of Redis in one atomic step.

The keys, all after a prefix:

    job:<id>            hash    `job`, the fixed record as JSON, and one field for each part of the state
    job:<id>:picture    string  its input images, one after the other, until the job has ended
    job:<id>:events     stream  its events
    queue               zset    id -> place, of queued jobs
    leases              zset    id -> when the lease ends, in ms of Redis' clock, of running jobs
    live                hash    id -> JSON of model, shape and predicted seconds left, of queued and running jobs
    workers             zset    worker -> until when it counts as living, in ms
    key:<owner>:<key>   string  fingerprint and id of the job that an idempotency key created
    webhooks            zset    id -> when to call its webhook next, in ms

A full Redis refuses a script whose first write would take memory, and runs all others to their end. The scripts that
keep, end or return jobs begin with a write that takes none.

Changes are published on a channel as `<what>:<id>`. All scripts get the prefix as KEYS[1] and the channel as KEYS[2],
and build the other keys from ids, so they need one server, not a cluster. A client that lost the answer of a script may
send the script again: the second call changes nothing.
"""

_COMMON = """
local prefix, channel = KEYS[1], KEYS[2]
local function now_ms()
    local now = redis.call('TIME')
    return now[1] * 1000 + math.floor(now[2] / 1000)
end
local function tell(id, name, data, what)
    redis.call('XADD', prefix .. 'job:' .. id .. ':events', 'MAXLEN', '~', 2000, '*', 'name', name, 'data', data)
    redis.call('PUBLISH', channel, (what or 'event') .. ':' .. id)
end
local function is_mine(id, lease)
    return redis.call('HGET', prefix .. 'job:' .. id, 'lease') == lease
end
local function queue_again(id)
    local job = prefix .. 'job:' .. id
    redis.call('HDEL', job, 'lease', 'num_steps')
    redis.call('HSET', job, 'status', 'queued', 'steps_done', 0)
    redis.call('ZREM', prefix .. 'leases', id)
    redis.call('ZADD', prefix .. 'queue', tonumber(redis.call('HGET', job, 'place')) or 0, id)
    tell(id, 'job.queued', '{}', 'queued')
end
local function let_go(id)
    redis.call('ZREM', prefix .. 'queue', id)
    redis.call('ZREM', prefix .. 'leases', id)
    redis.call('HDEL', prefix .. 'live', id)
end
local function is_gone(id)
    local job = prefix .. 'job:' .. id
    if redis.call('EXISTS', job) == 1 then return false end
    let_go(id)
    redis.call('DEL', job .. ':events', job .. ':picture')
    return true
end
"""

# ARGV: id, place, live entry, name of the idempotency key or '', its value, input images or '', fields…
# Returns the value of an idempotency key that exists already.
ADD = (
    _COMMON
    + """
local id, job = ARGV[1], prefix .. 'job:' .. ARGV[1]
if redis.call('EXISTS', job) == 1 then return false end
if ARGV[4] ~= '' then
    local key = prefix .. 'key:' .. ARGV[4]
    local existing = redis.call('GET', key)
    if existing and redis.call('EXISTS', prefix .. 'job:' .. string.match(existing, '[^ ]*$')) == 1 then
        return existing
    end
    redis.call('SET', key, ARGV[5])
    redis.call('HSET', job, 'key', key)
end
redis.call('HSET', job, 'status', 'queued', 'place', ARGV[2], unpack(ARGV, 7))
if ARGV[6] ~= '' then redis.call('SET', job .. ':picture', ARGV[6]) end
redis.call('ZADD', prefix .. 'queue', ARGV[2], id)
redis.call('HSET', prefix .. 'live', id, ARGV[3])
tell(id, 'job.queued', '{}', 'queued')
return false
"""
)

# ARGV: id, lease, its ms, time. Returns the number of the attempt, or nothing if another worker was faster or the job's
# record is gone.
CLAIM = (
    _COMMON
    + """
local id, job = ARGV[1], prefix .. 'job:' .. ARGV[1]
if is_mine(id, ARGV[2]) then return redis.call('HGET', job, 'attempts') end
if is_gone(id) or redis.call('ZREM', prefix .. 'queue', id) == 0 then return false end
redis.call('HSET', job, 'status', 'running', 'lease', ARGV[2], 'started_at', ARGV[4], 'steps_done', 0)
redis.call('ZADD', prefix .. 'leases', now_ms() + ARGV[3], id)
tell(id, 'job.started', '{}')
return redis.call('HINCRBY', job, 'attempts', 1)
"""
)

# ARGV: worker, ms that leases last, then id and lease of each. Returns the ids whose leases are lost, and the time in
# ms.
RENEW = (
    _COMMON
    + """
local ends, lost = now_ms() + ARGV[2], {}
redis.call('ZREMRANGEBYSCORE', prefix .. 'workers', '-inf', now_ms())
redis.call('ZADD', prefix .. 'workers', ends, ARGV[1])
for i = 3, #ARGV, 2 do
    if is_mine(ARGV[i], ARGV[i + 1]) then
        redis.call('ZADD', prefix .. 'leases', ends, ARGV[i])
    else
        table.insert(lost, ARGV[i])
    end
end
return {lost, now_ms()}
"""
)

# ARGV: id, lease, event, its data, live entry or '', fields…
RECORD = (
    _COMMON
    + """
local id = ARGV[1]
if not is_mine(id, ARGV[2]) then return end
if ARGV[5] ~= '' then redis.call('HSET', prefix .. 'live', id, ARGV[5]) end
if #ARGV > 5 then redis.call('HSET', prefix .. 'job:' .. id, unpack(ARGV, 6)) end
tell(id, ARGV[3], ARGV[4])
"""
)

# ARGV: id, lease or '' to end it without one, ms to keep the record, ms to keep the events, status, fields…
# Returns the fields of the job, one after the other, if this call ended it.
END = (
    _COMMON
    + """
local id, lease, job = ARGV[1], ARGV[2], prefix .. 'job:' .. ARGV[1]
if is_gone(id) then return false end
local status = redis.call('HGET', job, 'status')
if status ~= 'queued' and status ~= 'running' then
    let_go(id)
    if lease == '' or redis.call('HGET', job, 'ended_by') ~= lease then return false end
    return redis.call('HGETALL', job)
end
if lease ~= '' and not is_mine(id, lease) then return false end
let_go(id)
redis.call('HDEL', job, 'lease')
redis.call('HSET', job, 'status', ARGV[5], 'ended_by', lease, unpack(ARGV, 6))
if redis.call('HEXISTS', job, 'webhook_url') == 1 then
    redis.call('ZADD', prefix .. 'webhooks', 0, id)
end
redis.call('DEL', job .. ':picture')
tell(id, 'job.ended', '{"status": "' .. ARGV[5] .. '"}', ARGV[5])
redis.call('PEXPIRE', job, ARGV[3])
local key = redis.call('HGET', job, 'key')
if key then redis.call('PEXPIRE', key, ARGV[3]) end
redis.call('PEXPIRE', job .. ':events', ARGV[4])
return redis.call('HGETALL', job)
"""
)

# ARGV: id, lease
RELEASE = (
    _COMMON
    + """
if not is_mine(ARGV[1], ARGV[2]) then return end
queue_again(ARGV[1])
redis.call('HINCRBY', prefix .. 'job:' .. ARGV[1], 'attempts', -1)
"""
)

# ARGV: most attempts. Returns the ids that it queued again, and the ids of jobs that were claimed too often, each with
# the number of its attempts. Leases of jobs whose record is gone are deleted.
RECOVER = (
    _COMMON
    + """
local requeued, given_up = {}, {}
for _, id in ipairs(redis.call('ZRANGEBYSCORE', prefix .. 'leases', '-inf', now_ms(), 'LIMIT', 0, 100)) do
    if not is_gone(id) then
        local attempts = tonumber(redis.call('HGET', prefix .. 'job:' .. id, 'attempts')) or 0
        if attempts < tonumber(ARGV[1]) then
            queue_again(id)
            table.insert(requeued, id)
        else
            table.insert(given_up, {id, attempts})
        end
    end
end
return {requeued, given_up}
"""
)

# ARGV: ms to withhold it from others. Returns the id of an ended job whose webhook is due, and how often it was taken.
TAKE_WEBHOOK = (
    _COMMON
    + """
while true do
    local due = redis.call('ZRANGEBYSCORE', prefix .. 'webhooks', '-inf', now_ms(), 'LIMIT', 0, 1)
    if #due == 0 then return false end
    local job = prefix .. 'job:' .. due[1]
    if redis.call('EXISTS', job) == 1 then
        redis.call('ZADD', prefix .. 'webhooks', now_ms() + ARGV[1], due[1])
        return {due[1], redis.call('HINCRBY', job, 'webhook_attempts', 1) - 1}
    end
    redis.call('ZREM', prefix .. 'webhooks', due[1])
end
"""
)

# ARGV: id, ms until it is due again or ''
SETTLE_WEBHOOK = (
    _COMMON
    + """
if ARGV[2] == '' then
    redis.call('ZREM', prefix .. 'webhooks', ARGV[1])
else
    redis.call('ZADD', prefix .. 'webhooks', 'XX', now_ms() + ARGV[2], ARGV[1])
end
"""
)
