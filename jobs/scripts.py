"""Loads the Lua scripts: every write to a job is one of them, so it happens whole or not at all.

Key layout (prefix ``reel:``). Every key has an owner that removes it, or a limit:

========================== ====== ============================================ ==========================
key                        type   holds                                        goes away / limit
========================== ====== ============================================ ==========================
job:<id>                   hash   the record's changing part, short fields     purge, delete
body:<id>                  string request, callback, metadata as JSON          purge, delete
events:<id>                stream what SSE readers see, from the first start   EVENTS_CAP; purge, delete
lane:<model>:<level>:<key> zset   waiting jobs of one API key by queued_at     a job's start or end
lanes:<model>              zset   lanes by level * 2^40 + virtual time         with its last job
rising:<model>             zset   lanes by the time they rise a level          with its last job
vtime:<model>              hash   virtual time per level and key               when nobody waits; keys x 3
waiting:/running:<model>   hash   counts per level                             3 fields
leases:<model>             zset   running jobs by lease end                    a job's end, sweep
wake:<model>               list   tokens that wake sleeping nodes              64 entries, 1 h
claim:<nonce>              string job a claim took, for a lost reply           one lease
operation:<nonce>          string answer of a cancel, delete, reject, replay    1 min
queues                     set    models that ever had a job                   one entry a model
list:<key|*>:<filter>      zset   job ids for listing                          purge, delete
deadlines, retention       zset   jobs by due time                             start or end; purge
dead                       zset   dead letter: jobs by time of failure         replay, purge, delete
garbage                    zset   deleted jobs whose files still exist         garbage_done
idem:<key>:<idempotency>   hash   body hash and job                            idempotency_seconds
endpoints:<key>            hash   a key's webhook endpoints, without secrets   EndpointStore.remove; 10 a key
delivery:<msg>             hash   one webhook and its payload                  retention after the purge
deliveries:<id>            list   a job's, or an endpoint's, webhooks          retention after the purge
pending:<chain>            list   those not yet ended                          when they end
outbox                     zset   each chain's oldest pending webhook by due   delivered or dead
outbox:dead                zset   webhooks given up                            redeliver, purge; sweep
outcomes                   hash   webhook attempts ever, by outcome            4 fields
gone:<sha1 of url>         string the address answered 410                     1 day
nodes, node:<id>           zset,  node registry (plain commands, no scripts)   NODE_SECONDS after a beat
                           string
drain:<id>                 string an operator's wish                           1 day
models                     hash   model cards                                  withdraw_model
apikeys, apikeys:hashes    hash   API keys                                     one entry a key made
apikeys:endpoints          hash   webhook endpoints' secrets, encrypted        EndpointStore.remove
fence                      string the write that WAIT waits for, durable runs   FENCE_SECONDS
timings:<model>            hash   seconds that jobs took, by shape             SHAPES_CAP fields
uploads, uploads:users     zset,  input images by expiry; live jobs using one  UploadIndex.done; at 0
                           hash
========================== ====== ============================================ ==========================

Level: 0 high, 1 normal, 2 low. Redis Cluster is not supported: scripts compute keys from records.
"""

import json
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from redis.exceptions import NoScriptError

from jobs.client import RedisClient, guard, require_text
from jobs.errors import StoreUnavailable
from jobs.settings import Settings

PREFIX = "reel:"
EVENTS_CAP = 1000  # entries a job's stream keeps, about
FENCE_SECONDS = 60
ENDPOINT_LOG = 200  # deliveries that an endpoint's log names
_PRELUDE = ("_base", "_lanes", "_notify", "_moves")
FOLDER = Path(__file__).parent / "lua"


@cache
def source(name: str) -> str:
    """The full text of script `name`, prelude included."""
    return "\n".join((FOLDER / f"{part}.lua").read_text() for part in (*_PRELUDE, name))


class Scripts:
    """Runs scripts by their SHA-1, loading them again when Redis has forgotten them (restart, failover)."""

    def __init__(self, redis: RedisClient, settings: Settings) -> None:
        require_text(redis)
        self.redis = redis
        self._wait = (settings.redis_wait_replicas, settings.redis_wait_ms)
        self._shas: dict[str, str] = {}
        self._conf = json.dumps(
            {
                "lease_seconds": settings.lease_seconds,
                "max_attempts": settings.max_attempts,
                "aging_seconds": settings.aging_seconds,
                "retention_seconds": settings.retention_seconds,
                "delivery_seconds": settings.retention_seconds,
                "idempotency_seconds": settings.idempotency_seconds,
                "webhook_progress_seconds": settings.webhook_progress_seconds,
                "events_cap": EVENTS_CAP,
                "endpoint_log": ENDPOINT_LOG,
            }
        )

    def run(self, name: str, *args: str | int | float, durable: bool = False) -> Any:
        """Run one script and return its reply.

        durable: also wait until `redis_wait_replicas` replicas have the write, also an earlier one's.
        Raises StoreUnavailable when Redis can't be reached, refuses writes, or too few replicas answered; the
        call may then be made again, since every script tolerates a repeat.
        """
        with guard():
            if not (durable and self._wait[0]):
                return self._evalsha(self.redis, name, args)
            reply, reached = self._replicated(name, args)
        if reached < self._wait[0]:
            raise StoreUnavailable(
                f"{reached} of {self._wait[0]} replicas confirmed in {self._wait[1]} ms; try again shortly"
            )
        return reply

    def _evalsha(self, client: RedisClient, name: str, args: Iterable[str | int | float]) -> Any:
        sha = self._shas.get(name) or self._load(client, name)
        try:
            return client.execute_command("EVALSHA", sha, 0, self._conf, *args)
        except NoScriptError:
            return client.execute_command("EVALSHA", self._load(client, name), 0, self._conf, *args)

    def _replicated(self, name: str, args: Iterable[str | int | float]) -> tuple[Any, int]:
        """The script's reply, and how many replicas have its write.

        Script and WAIT are one pipeline on one connection: a retry sends both again, so no server vouches
        for a script that only its predecessor ran. The write between them is for a script that finds its work
        done: WAIT answers for its own connection's last write, and this one is later than the work. A server
        that never had a replica counts no offset, and its WAIT (of Redis 6.2) takes the first one for done
        before that has read what it was sent: nothing is confirmed there.
        """
        replies: list[Any] = []
        for _ in range(2):
            pipe = self.redis.pipeline(transaction=False)
            sha = self._shas.get(name) or self._load(self.redis, name)
            pipe.execute_command("EVALSHA", sha, 0, self._conf, *args)
            pipe.execute_command("SET", f"{PREFIX}fence", 1, "EX", FENCE_SECONDS)
            pipe.execute_command("WAIT", *self._wait)
            pipe.execute_command("INFO", "replication")
            replies = pipe.execute(raise_on_error=False)
            if not isinstance(replies[0], NoScriptError):
                break
            self._shas.pop(name, None)
        for one in replies:
            if isinstance(one, Exception):
                raise one
        counts_offsets = replies[3].get("master_repl_offset") != 0
        return replies[0], int(replies[2]) if counts_offsets else 0

    def _load(self, client: RedisClient, name: str) -> str:
        sha = str(client.execute_command("SCRIPT LOAD", source(name)))
        self._shas[name] = sha
        return sha
