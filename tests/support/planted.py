"""Bugs to plant in the Lua scripts, to prove that a checker can fail. Used by tests only.

A process of its own (a chaos run) plants one by `plant(name)` before it makes a JobStore.
"""

from dataclasses import dataclass

import jobs.scripts


@dataclass(frozen=True)
class Bug:
    """One change of one script's text; `old` must be there."""

    script: str  # file name without .lua; a prelude part changes every script
    old: str
    new: str


BUGS = {
    "no fencing in finish": Bug(
        "finish",
        "local refused = refuse(job, ARGV[3], 'finish')",
        "local refused = nil",
    ),
    "no fencing in heartbeat": Bug(
        "heartbeat",
        "local refused = refuse(job, ARGV[3], '')",
        "local refused = nil",
    ),
    "the lease is freed before the commit": Bug(
        "finish",
        "conclude(job, 'succeeded'",
        "lease_drop(job)\ndo return reply(job) end\nconclude(job, 'succeeded'",
    ),
    "a start takes no lease": Bug(
        "_moves",
        "  lease_take(job)\n",
        "",
    ),
    "the outbox is outside the script": Bug(
        "_notify",
        "  append(job, event, data)\n  deliver(job, event, data)",
        "  append(job, event, data)",
    ),
    "the token does not rise": Bug(
        "_moves",
        "math.max(job.token + 1, clock[1] * 1e6 + clock[2])",
        "math.max(1, job.token)",
    ),
    "a lost lease is not charged": Bug(
        "_moves",
        "local attempts = job.attempts + 1",
        "local attempts = job.attempts + (class == 'lost' and 0 or 1)",
    ),
    "giving back costs an attempt": Bug(
        "give_back",
        "requeue(job, {",
        "requeue(job, {attempts = tostring(job.attempts + 1), ",
    ),
    "a returned job goes to the back": Bug(
        "_moves",
        "  move(job, 'queued', fields)\n",
        "  fields.queued_at = seconds(now)\n  move(job, 'queued', fields)\n",
    ),
    "keys do not share": Bug(
        "_lanes",
        "local turn = math.max(tonumber(turns[1] or 0), tonumber(turns[2] or 0))",
        "local turn = 0",
    ),
    "priorities do not count": Bug(
        "_lanes",
        "effective * SPAN + turn",
        "turn",
    ),
    "a cancel is forgotten by a failure": Bug(
        "_moves",
        "if job.cancel_requested == '1' then\n    conclude(job, 'canceled', fields)\n  elseif again",
        "if again",
    ),
    "no dead letter": Bug(
        "_moves",
        "redis.call('ZADD', P .. 'dead', seconds(now), job.id)",
        "",
    ),
    "an expired job runs": Bug(
        "_moves",
        "return job.deadline_at ~= ''",
        "return false and job.deadline_at ~= ''",
    ),
    "a state index is left behind": Bug(
        "_base",
        "    redis.call('ZREM', prefix .. job.state, job.id)\n    redis.call('ZADD', prefix .. state",
        "    redis.call('ZADD', prefix .. state",
    ),
    "a failure that is sent again counts twice": Bug(
        "fail",
        "refuse(job, ARGV[3], 'fail')",
        "(job.state == 'running' and refuse(job, ARGV[3], 'fail') or nil)",
    ),
    "deliveries of a job go at once": Bug(
        "_notify",
        "elseif redis.call('RPUSH', pending, id) == 1 then\n    outbox_head(to.chain, now)",
        "else\n    redis.call('RPUSH', pending, id)\n    redis.call('ZADD', P .. 'outbox', seconds(now), id)",
    ),
    "the version stands still": Bug(
        "_base",
        "tostring(job.version + 1)",
        "tostring(math.max(1, job.version))",
    ),
}


def plant(name: str) -> None:
    """Make this process load scripts with the bug `name` from now on (until `harvest`)."""
    bug = BUGS[name]
    folder = jobs.scripts.FOLDER
    original = (folder / f"{bug.script}.lua").read_text()
    assert original.count(bug.old) >= 1, (
        f"{bug.script}.lua no longer holds {bug.old!r}: bring the bug up to date"
    )

    def source(script: str) -> str:
        return SOURCE(script).replace(original, original.replace(bug.old, bug.new))

    jobs.scripts.source = source  # type: ignore[assignment]


def harvest() -> None:
    """Load the real scripts again."""
    jobs.scripts.source = SOURCE


SOURCE = jobs.scripts.source
