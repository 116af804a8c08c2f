"""A customer of the deployment under test: submits jobs, takes their webhooks, counts what became of them."""

import contextlib
import io
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
from pydantic import SecretStr

from infra.client import ReelClient
from infra.receiver import Receiver
from jobs.client import connect
from jobs.errors import StoreUnavailable
from jobs.events import read_events
from jobs.job import Job
from jobs.nodes import NodeInfo, NodeRegistry
from jobs.settings import Settings
from jobs.storage import ObjectStore
from jobs.store import JobStore
from tests.ops.compose import Deployment, Process, until

LEASE = "4"  # seconds: a dead node's job is taken over this soon
NODE = {"REEL_NODE_RANKS": "1", "REEL_LEASE_SECONDS": LEASE, "REEL_DRAIN_SECONDS": "60"}
# What the tests set beside the compose file: short leases, and callbacks to this machine's own receiver.
QUICK = {"REEL_LEASE_SECONDS": LEASE, "REEL_ALLOW_LOOPBACK_CALLBACKS": "true"}
STEPS = 60  # of a tiny video: about half a second of one core


def bucket(deployment: Deployment) -> ObjectStore:
    """The deployment's bucket, as its operator uses it."""
    secret = Path(deployment.secret("s3_secret_ops")).read_text()
    endpoint = deployment.url("s3")
    return ObjectStore(Settings(s3_endpoint=endpoint, s3_access_key="ops", s3_secret_key=SecretStr(secret)))


class Fleet:
    """Jobs of one key, with all their webhooks."""

    def __init__(self, deployment: Deployment) -> None:
        self.deployment = deployment
        self.jobs: dict[str, str] = {}  # id to the API that took it
        settings = Settings(redis_url=(deployment.folder / "secrets/redis_url_ops").read_text().strip())
        self._redis = client = connect(settings)
        self.store, self.registry = JobStore(client, settings), NodeRegistry(client)
        _, key, secret = (line.split()[-1] for line in deployment.ops("keys", "create", "load").splitlines())
        self.key = key
        self._clients: dict[str, ReelClient] = {}
        self._s3 = httpx.Client(trust_env=False)
        self._told = io.StringIO()
        self._receiver = Receiver("127.0.0.1", 0, secret, self._told)
        self.callback = f"http://127.0.0.1:{self._receiver.server_address[1]}/"
        threading.Thread(target=self._receiver.serve_forever, args=(0.1,), daemon=True).start()

    def node(self, name: str, **options: Any) -> Process:
        """One more node, by its real command line."""
        return self.deployment.start("node-cpu", name, REEL_NODE_ID=name, **NODE, **options)

    def submit(self, count: int, api: str | None = None, **fields: Any) -> list[str]:
        """So many jobs."""
        url = api or self.deployment.url("api")
        body = {"prompt": "a red ball", "sampling_steps": STEPS, "callback_url": self.callback, **fields}
        client = self._client(url)
        ids = [str(client.submit({**body, "seed": len(self.jobs) + n})["id"]) for n in range(count)]
        self.jobs |= dict.fromkeys(ids, url)
        return ids

    @contextlib.contextmanager
    def load(self, waiting: int) -> Iterator[None]:
        """Customers that keep so many jobs waiting while the block runs."""
        over, failed = threading.Event(), []

        def feed() -> None:
            try:
                while not over.wait(0.2):
                    rows = self.store.queue_stats()
                    self.submit(max(0, waiting - sum(row.waiting for row in rows)))
            except StoreUnavailable:  # our own look at the queue, while Redis is away; submits bear that
                feed()
            except Exception as error:
                failed.append(error)

        feeder = threading.Thread(target=feed, daemon=True)
        feeder.start()
        try:
            yield
        finally:
            over.set()
            feeder.join(30)
        assert not failed, failed

    def job(self, job_id: str, api: str | None = None) -> dict[str, Any]:
        """One job, as its customer sees it."""
        return self._client(api or self.deployment.url("api")).job(job_id)

    def records(self) -> dict[str, Job]:
        """All jobs as an operator sees them, by id."""
        rows, cursor = self.store.list("*", limit=500)
        while cursor:
            more, cursor = self.store.list("*", limit=500, cursor=cursor)
            rows += more
        return {row.id: row for row in rows}

    def story(self, job_id: str) -> str:
        """What happened to a job but its progress, for a failed assertion."""
        events = read_events(self._redis, job_id)
        told = [f"{event.type} {event.data}" for event in events if event.type != "job.progress"]
        return "\n".join([job_id, *told])

    def nodes(self) -> dict[str, NodeInfo]:
        """All nodes as an operator sees them, by id."""
        return {node.id: node for node in self.registry.list()}

    def serving(self, *names: str, seconds: float = 90.0) -> None:
        """Wait until all these nodes take jobs."""

        def look() -> bool:
            nodes = self.nodes()
            for process in self.deployment.processes:
                assert process.name not in names or process.running, process.said()[-2000:]
            return all(name in nodes and nodes[name].state in ("idle", "busy") for name in names)

        until(look, seconds, f"the nodes {names}")

    def all_done(self, seconds: float) -> dict[str, Job]:
        """Wait until every job has ended; the records of ours."""

        def look() -> dict[str, Job] | None:
            ours = {job_id: row for job_id, row in self.records().items() if job_id in self.jobs}
            return ours if all(row.terminal for row in ours.values()) else None

        return until(look, seconds, "the end of all jobs")

    def webhooks(self) -> dict[str, list[str]]:
        """The events that were received with a good signature, by job; a repeated webhook-id counts once."""
        found: dict[str, list[str]] = {job_id: [] for job_id in self.jobs}
        for line in map(json.loads, self._told.getvalue().splitlines()):
            assert line["verified"], line
            if not line["duplicate"]:
                found[line["data"]["id"]].append(line["type"])
        return found

    def video(self, job_id: str) -> bytes:
        """The finished MP4, by the URL that a customer gets."""
        answer = self._s3.get(self._client(self.deployment.url("api")).signed_url(job_id))
        assert answer.status_code == 200
        return answer.content

    def _client(self, url: str) -> ReelClient:
        """One a URL: making one takes longer than a request."""
        if url not in self._clients:
            self._clients[url] = ReelClient(url, self.key)
        return self._clients[url]

    def close(self) -> None:
        """Stop listening."""
        for client in self._clients.values():
            client.__exit__()
        self._s3.close()
        self._receiver.shutdown()
        self._receiver.server_close()
