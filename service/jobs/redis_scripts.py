"""Lua scripts that change several keys of Redis in one atomic step.

The keys, all after a prefix:

    job:<id>            hash    `job`, the fixed record as JSON, and one field for each part of the state
    job:<id>:picture    string  its input images, one after the other, until the job has ended
    job:<id>:events     stream  its events
    queue:<kind>        zset    id -> place, of the queued jobs of one kind
    heads               zset    kind -> place of its first job, of the kinds that have queued jobs
    kinds               hash    kind -> JSON of what a worker must know to say whether it has room, of those in `heads`
    leases              zset    id -> when the lease ends, in ms of Redis' clock, of running jobs
    counted             hash    id -> JSON of what the job adds to the sums, of queued and running jobs
    load                hash    number and microseconds left of queued and of running jobs, microseconds left of urgent
                                ones, by model, and image bytes
    owners              hash    owner -> microseconds left of its queued and running jobs
    jobs, jobs:<owner>  zset    id -> arrival in microseconds: all jobs that have a record, and those of one owner
    expiring            zset    id and owner -> when its record is deleted, in ms, of ended jobs
    idle:<class>        zset    worker -> since when it has nothing to claim, in ms, of a class
    claim:<worker>      string  lease and id of its latest claim, for a minute
    workers             zset    worker -> until when it counts as living, in ms
    worker_records      hash    worker -> JSON of its record, without the cards of its models
    card:<hash>         string  JSON of a model's card, for as long as a worker announces it
    key:<owner>:<key>   string  fingerprint and id of the job that an idempotency key created
    webhooks            zset    id -> when to call its webhook next, in ms
    queue, live                 jobs that the version before queued, see `redis_adoption`

A kind's name is a digest of 16 characters and its class: `h` for urgent jobs or `n`, and the model.

A full Redis refuses a script whose first write would take memory, and runs all others to their end. The scripts that
keep, end or return jobs begin with a write that takes none.

Two channels carry messages, which can be lost. Those who follow a job hear on `job:<id>` that it has changed. A worker
hears on `worker:<id>` that there is a job to claim (`queued`), or that one of its jobs is cancelled
(`cancelled:<id>`).

All scripts get the prefix as KEYS[1] and build the other keys from ids, so they need one server, not a cluster. A
client that lost the answer of a script may send the script again: the second call changes nothing.
"""

COMMON = """
local prefix = KEYS[1]
local function now_ms()
    local now = redis.call('TIME')
    return now[1] * 1000 + math.floor(now[2] / 1000)
end
local function tell(id, name, data)
    redis.call('XADD', prefix .. 'job:' .. id .. ':events', 'MAXLEN', '~', 2000, '*', 'name', name, 'data', data)
    redis.call('PUBLISH', prefix .. 'job:' .. id, name)
end
local function is_mine(id, lease)
    return redis.call('HGET', prefix .. 'job:' .. id, 'lease') == lease
end
local function class_of(kind)
    return string.sub(kind, 17)
end
local function is_urgent(kind)
    return string.sub(kind, 17, 17) == 'h'
end

-- The sums. An entry of `counted`: status, model, microseconds left, those of the whole job, image bytes, owner, kind.
local function add(key, field, amount)
    if amount ~= 0 and redis.call('HINCRBY', key, field, string.format('%.0f', amount)) == 0 then
        redis.call('HDEL', key, field)
    end
end
local function count(id, status, model, us, image_bytes, owner, kind)
    redis.call('HSET', prefix .. 'counted', id, cjson.encode({status, model, us, us, image_bytes, owner, kind}))
    add(prefix .. 'load', status .. ':' .. model, 1)
    add(prefix .. 'load', status .. '_us:' .. model, us)
    if is_urgent(kind) then add(prefix .. 'load', 'urgent_us:' .. model, us) end
    add(prefix .. 'load', 'image_bytes', image_bytes)
    if owner ~= '' then add(prefix .. 'owners', owner, us) end
end
-- Move a job to another status, or out of the sums without one. Without `us`, all of its work is left.
-- Returns its entry, nothing if it is not counted.
local function recount(id, status, us)
    local entry = redis.call('HGET', prefix .. 'counted', id)
    if not entry then return nil end
    entry = cjson.decode(entry)
    local was, model, left, load = entry[1], entry[2], status and (us or entry[4]) or 0, prefix .. 'load'
    if status == was then
        add(load, was .. '_us:' .. model, left - entry[3])
    else
        add(load, was .. ':' .. model, -1)
        add(load, was .. '_us:' .. model, -entry[3])
        if status then
            add(load, status .. ':' .. model, 1)
            add(load, status .. '_us:' .. model, left)
        end
    end
    if is_urgent(entry[7]) then add(load, 'urgent_us:' .. model, left - entry[3]) end
    if entry[6] ~= '' then add(prefix .. 'owners', entry[6], left - entry[3]) end
    if status then
        entry[1], entry[3] = status, left
        redis.call('HSET', prefix .. 'counted', id, cjson.encode(entry))
    else
        add(load, 'image_bytes', -entry[5])
        redis.call('HDEL', prefix .. 'counted', id)
    end
    return entry
end

-- Wake the worker that has been idle the longest. One that does not listen is dead, or looks when it does.
local function wake(class)
    while true do
        local worker = redis.call('ZPOPMIN', prefix .. 'idle:' .. class)[1]
        if not worker or redis.call('PUBLISH', prefix .. 'worker:' .. worker, 'queued') > 0 then return end
    end
end
-- Put a worker down as idle in the classes of its models, but for those that have jobs.
local function rest(worker, models, has_jobs)
    local now = now_ms()
    for _, model in ipairs(models) do
        for _, class in ipairs({'h' .. model, 'n' .. model}) do
            if not has_jobs[class] then
                redis.call('ZREMRANGEBYSCORE', prefix .. 'idle:' .. class, '-inf', now - 60000)
                redis.call('ZADD', prefix .. 'idle:' .. class, now, worker)
            end
        end
    end
end
local function enqueue(id, kind, kind_json, place)
    local queue = prefix .. 'queue:' .. kind
    redis.call('ZADD', queue, place, id)
    if redis.call('ZRANK', queue, id) == 0 then
        redis.call('ZADD', prefix .. 'heads', place, kind)
        redis.call('HSET', prefix .. 'kinds', kind, kind_json)
    end
    wake(class_of(kind))
end
local function dequeue(id, kind)
    local queue = prefix .. 'queue:' .. kind
    if redis.call('ZREM', queue, id) == 0 then return false end
    local head = redis.call('ZRANGE', queue, 0, 0, 'WITHSCORES')
    if #head > 0 then
        redis.call('ZADD', prefix .. 'heads', head[2], kind)
    else
        redis.call('ZREM', prefix .. 'heads', kind)
        redis.call('HDEL', prefix .. 'kinds', kind)
    end
    return true
end
local function queue_again(id)
    local job = prefix .. 'job:' .. id
    redis.call('ZREM', prefix .. 'leases', id)
    redis.call('HDEL', job, 'lease', 'num_steps', 'worker')
    redis.call('HSET', job, 'status', 'queued', 'steps_done', 0)
    local place, entry = tonumber(redis.call('HGET', job, 'place')) or 0, recount(id, 'queued')
    if entry then
        enqueue(id, entry[7], redis.call('HGET', job, 'kind') or '', place)
    else
        redis.call('ZADD', prefix .. 'queue', place, id)
    end
    tell(id, 'job.queued', '{}')
end
-- Returns the job's entry, nothing if it was not counted: then the version before may have queued it.
local function let_go(id)
    redis.call('ZREM', prefix .. 'leases', id)
    local entry = recount(id)
    if not entry then
        redis.call('ZREM', prefix .. 'queue', id)
        redis.call('HDEL', prefix .. 'live', id)
    elseif entry[1] == 'queued' then
        dequeue(id, entry[7])
    end
    return entry
end
local function is_gone(id)
    local job = prefix .. 'job:' .. id
    if redis.call('EXISTS', job) == 1 then return false end
    let_go(id)
    redis.call('DEL', job .. ':events', job .. ':picture')
    return true
end
local function trim(most)
    for _, member in ipairs(redis.call('ZRANGEBYSCORE', prefix .. 'expiring', '-inf', now_ms(), 'LIMIT', 0, most)) do
        local id, owner = string.match(member, '^(%S*) (.*)$')
        redis.call('ZREM', prefix .. 'expiring', member)
        redis.call('ZREM', prefix .. 'jobs', id)
        if owner ~= '' then redis.call('ZREM', prefix .. 'jobs:' .. owner, id) end
    end
end
"""

# ARGV: id, model, kind, its JSON, microseconds of work, owner or '', name of the idempotency key or '', its value,
# input images or '', place, fields…
# Returns the value of an idempotency key that exists already.
ADD = (
    COMMON
    + """
local id, model, kind, us, owner, name = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[5]), ARGV[6], ARGV[7]
local job, place = prefix .. 'job:' .. id, ARGV[10]
if redis.call('EXISTS', job) == 1 then return false end
if name ~= '' then
    local key = prefix .. 'key:' .. name
    local existing = redis.call('GET', key)
    if existing and redis.call('EXISTS', prefix .. 'job:' .. string.match(existing, '[^ ]*$')) == 1 then
        return existing
    end
    redis.call('SET', key, ARGV[8])
    redis.call('HSET', job, 'key', key)
end
redis.call('HSET', job, 'status', 'queued', 'place', place, 'kind', ARGV[4], unpack(ARGV, 11))
if ARGV[9] ~= '' then redis.call('SET', job .. ':picture', ARGV[9]) end
count(id, 'queued', model, us, #ARGV[9], owner, kind)
local now = redis.call('TIME')
local arrival = string.format('%.0f', now[1] * 1000000 + now[2])
redis.call('ZADD', prefix .. 'jobs', arrival, id)
if owner ~= '' then redis.call('ZADD', prefix .. 'jobs:' .. owner, arrival, id) end
enqueue(id, kind, ARGV[4], place)
tell(id, 'job.queued', '{}')
return false
"""
)

# ARGV: ms that leases last, then id and lease of each. Returns the ids whose leases are lost, and the time in ms.
RENEW = (
    COMMON
    + """
local ends, lost = now_ms() + ARGV[1], {}
redis.call('ZREMRANGEBYSCORE', prefix .. 'workers', '-inf', now_ms())
for i = 2, #ARGV, 2 do
    if is_mine(ARGV[i], ARGV[i + 1]) then
        redis.call('ZADD', prefix .. 'leases', ends, ARGV[i])
    else
        table.insert(lost, ARGV[i])
    end
end
return {lost, now_ms()}
"""
)

# ARGV: id, lease, event, its data, microseconds left or '', fields…
RECORD = (
    COMMON
    + """
local id = ARGV[1]
if not is_mine(id, ARGV[2]) then return end
if ARGV[5] ~= '' then recount(id, 'running', tonumber(ARGV[5])) end
if #ARGV > 5 then redis.call('HSET', prefix .. 'job:' .. id, unpack(ARGV, 6)) end
tell(id, ARGV[3], ARGV[4])
"""
)

# ARGV: id, lease or '' to end it without one, ms to keep the record, ms to keep the events, status, worker, JSON of its
# models, fields…
# Returns the fields of the job, one after the other, if this call ended it, and 1 if nothing is queued. The worker that
# ended its job has room for another one, so it is idle then.
END = (
    COMMON
    + """
local id, lease, job = ARGV[1], ARGV[2], prefix .. 'job:' .. ARGV[1]
if is_gone(id) then return false end
local status = redis.call('HGET', job, 'status')
if status ~= 'queued' and status ~= 'running' then
    let_go(id)
    if lease == '' or redis.call('HGET', job, 'ended_by') ~= lease then return false end
    return {redis.call('HGETALL', job), 0}
end
if lease ~= '' and not is_mine(id, lease) then return false end
local entry = let_go(id)
local holder = redis.call('HGET', job, 'worker')
redis.call('HDEL', job, 'lease', 'worker')
redis.call('HSET', job, 'status', ARGV[5], 'ended_by', lease, unpack(ARGV, 8))
if redis.call('HEXISTS', job, 'webhook_url') == 1 then
    redis.call('ZADD', prefix .. 'webhooks', 0, id)
end
redis.call('DEL', job .. ':picture')
tell(id, 'job.ended', '{"status": "' .. ARGV[5] .. '"}')
if holder and lease == '' then redis.call('PUBLISH', prefix .. 'worker:' .. holder, ARGV[5] .. ':' .. id) end
redis.call('PEXPIRE', job, ARGV[3])
local key = redis.call('HGET', job, 'key')
if key then redis.call('PEXPIRE', key, ARGV[3]) end
redis.call('PEXPIRE', job .. ':events', ARGV[4])
redis.call('ZADD', prefix .. 'expiring', now_ms() + ARGV[3], id .. ' ' .. (entry and entry[6] or ''))
trim(2)
local is_idle = lease ~= '' and redis.call('EXISTS', prefix .. 'heads') == 0
if is_idle then rest(ARGV[6], cjson.decode(ARGV[7]), {}) end
return {redis.call('HGETALL', job), is_idle and 1 or 0}
"""
)

# ARGV: id, lease
RELEASE = (
    COMMON
    + """
if not is_mine(ARGV[1], ARGV[2]) then return end
queue_again(ARGV[1])
redis.call('HINCRBY', prefix .. 'job:' .. ARGV[1], 'attempts', -1)
"""
)

# ARGV: most attempts. Returns the ids that it queued again, and the ids of jobs that were claimed too often, each with
# the number of its attempts. Leases of jobs whose record is gone are deleted.
# It also looks at some of the counted jobs: one that a process of the version before ended is counted no more. If no
# job is counted, all sums are 0, whatever a process of another version left in them.
RECOVER = (
    COMMON
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
for _, id in ipairs(redis.call('HRANDFIELD', prefix .. 'counted', 10)) do
    local status = redis.call('HGET', prefix .. 'job:' .. id, 'status')
    if status ~= 'queued' and status ~= 'running' and not is_gone(id) then let_go(id) end
end
if redis.call('EXISTS', prefix .. 'counted') == 0 then redis.call('DEL', prefix .. 'load', prefix .. 'owners') end
trim(100)
return {requeued, given_up}
"""
)

# ARGV: ms to withhold it from others. Returns the id of an ended job whose webhook is due, and how often it was taken.
TAKE_WEBHOOK = (
    COMMON
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
    COMMON
    + """
if ARGV[2] == '' then
    redis.call('ZREM', prefix .. 'webhooks', ARGV[1])
else
    redis.call('ZADD', prefix .. 'webhooks', 'XX', now_ms() + ARGV[2], ARGV[1])
end
"""
)

# ARGV: id. Returns how many queued jobs of its model come before it, nothing unless it is queued.
POSITION = (
    COMMON
    + """
local id = ARGV[1]
local entry = redis.call('HGET', prefix .. 'counted', id)
if not entry then return false end
local kind = cjson.decode(entry)[7]
local place = redis.call('ZSCORE', prefix .. 'queue:' .. kind, id)
if not place then return false end
local before = redis.call('ZRANK', prefix .. 'queue:' .. kind, id)
for _, other in ipairs(redis.call('ZRANGEBYSCORE', prefix .. 'heads', '-inf', place)) do
    if other ~= kind and string.sub(other, 18) == string.sub(kind, 18) then
        before = before + redis.call('ZCOUNT', prefix .. 'queue:' .. other, '-inf', '(' .. place)
    end
end
return before
"""
)

# ARGV: owner or '' for all, most, id of the job before which they came or ''. Returns the id and the fields of each
# job, newest first; nothing if there is no such job.
JOBS = (
    COMMON
    + """
trim(100)
local index = prefix .. 'jobs' .. (ARGV[1] ~= '' and ':' .. ARGV[1] or '')
local from, jobs = 0, {}
if ARGV[3] ~= '' then
    local rank = redis.call('ZREVRANK', index, ARGV[3])
    if not rank then return false end
    from = rank + 1
end
for _, id in ipairs(redis.call('ZREVRANGE', index, from, from + ARGV[2] - 1)) do
    table.insert(jobs, {id, redis.call('HGETALL', prefix .. 'job:' .. id)})
end
return jobs
"""
)
