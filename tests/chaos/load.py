"""Clients: they submit until they have a 202, cancel, look, and write down every answer."""

import asyncio
import random
import time
from typing import Any

import httpx

from jobs.nodes import NodeRegistry
from tests.chaos import engine
from tests.chaos.history import History
from tests.chaos.world import World

OUTSTANDING = 60  # jobs that the clients keep in the service
ALL_EVENTS = ["job.started", "job.succeeded", "job.failed", "job.canceled", "job.expired"]
TIMEOUT = httpx.Timeout(8.0, connect=2.0)


class Load:
    """`run` until `stop`; also submits for the fault injector."""

    def __init__(self, world: World, history: History, rng: random.Random, rate: float, real: int) -> None:
        """rate: jobs a second at most. real: jobs for the node with the real engine."""
        self._world, self._history, self._rng, self._rate = world, history, rng, rate
        self._real = real
        self._real_model = ""
        self._longest = 0  # frames of a video of the real model
        self.sent = 0
        self.accepted: list[str] = []
        self.stopped = False
        self._tasks: set[asyncio.Task[Any]] = set()
        self._waiting = 0
        self._client = httpx.AsyncClient(base_url=world.url, timeout=TIMEOUT, trust_env=False)

    async def run(self, seconds: float) -> None:
        """Submit at most `rate` jobs a second while not too many are in the service."""
        counter = asyncio.create_task(self._count())
        began, real = time.monotonic(), 0
        while not self.stopped:
            if self._waiting + len(self._tasks) < OUTSTANDING:
                self._spawn(self._life())
                self._waiting += 1
            passed = time.monotonic() - began
            if real < self._real and passed / seconds > real / self._real * 0.9:
                real += 1
                self._spawn(self.submit_real())
            await asyncio.sleep(1 / self._rate)
        counter.cancel()
        while self._tasks:
            await asyncio.wait(set(self._tasks))

    async def close(self) -> None:
        """Drop the connections."""
        await self._client.aclose()

    def _spawn(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _count(self) -> None:
        """How many jobs are waiting or running, from the store itself."""
        while True:
            try:
                rows = await asyncio.to_thread(self._world.store.queue_stats)
                self._waiting = sum(row.waiting + row.running for row in rows if row.model == engine.NAME)
            except Exception as error:  # Redis is being killed, too
                self._history.add("note", what="stats", error=type(error).__name__)
            await asyncio.sleep(0.5)

    async def _life(self) -> None:
        """One job as a client lives it."""
        kind = self._rng.random()
        fields: dict[str, Any] = {}
        if kind < 0.05:
            fields["deadline_seconds"] = self._rng.uniform(0.2, 4.0)
        elif kind < 0.09:
            fields["sampling_steps"] = 40
        elif kind < 0.11:
            fields["prompt"] = "refuse this"
        if self._rng.random() < 0.2:
            fields["priority"] = self._rng.choice(["high", "low"])
        job_id = await self.submit(**fields)
        if kind > 0.9:
            await asyncio.sleep(self._rng.choice([0.0, 0.3, 1.0, 5.0]))
            await self.cancel(job_id)
        elif kind > 0.85:
            await self.watch(job_id)

    async def submit(self, **fields: Any) -> str:
        """POST until it is accepted, always with the same Idempotency-Key; the job's id."""
        self.sent += 1
        seed = self.sent
        body = {
            "prompt": "a chaos of things",
            "model": engine.NAME,
            "seed": seed,
            "sampling_steps": 4,
            "callback_url": self._world.receiver.url(),
            "webhook_events": ALL_EVENTS,
            "metadata": {"ref": f"seed-{seed}"},
            **fields,
        }
        idem, key = f"idem-{seed}", self._world.api_keys[seed % 3]
        if self._rng.random() < 0.05:  # an impatient client: twice at once
            ids = await asyncio.gather(self._post(idem, key, body), self._post(idem, key, body))
            job_id = ids[0]
        else:
            job_id = await self._post(idem, key, body)
        self.accepted.append(job_id)
        return job_id

    async def submit_real(self, *, longest: bool = False, **fields: Any) -> str:
        """A job for the real engine; few different ones, so that their videos can be compared.

        `longest`: as many frames as the model makes.
        """
        if not self._real_model:
            cards = await asyncio.to_thread(NodeRegistry(self._world.store.redis).models)
            (card,) = (card for card in cards if card.name != engine.NAME)
            self._real_model, self._longest = card.name, card.max_frame_num
        if longest:
            fields["frame_num"] = self._longest
        few: dict[str, Any] = {"frame_num": 5, "sampling_steps": 4}
        return await self.submit(model=self._real_model, seed=self._rng.randrange(4), **(few | fields))

    async def _post(self, idem: str, key: str, body: dict[str, Any]) -> str:
        headers = {"Authorization": f"Bearer {key}", "Idempotency-Key": idem}
        while True:
            t0 = time.time()
            try:
                answer = await self._client.post("/v1/jobs", json=body, headers=headers)
            except httpx.HTTPError as error:
                self._history.add("submit", t0=t0, idem=idem, seed=body["seed"], err=type(error).__name__)
                await asyncio.sleep(0.3)
                continue
            record = {"t0": t0, "idem": idem, "seed": body["seed"], "st": answer.status_code}
            if answer.status_code in (200, 202):
                job_id = str(answer.json()["id"])
                self._history.add("submit", **record, id=job_id, prompt=body["prompt"], model=body["model"])
                return job_id
            retry_after = answer.headers.get("retry-after")
            self._history.add("submit", **record, retry_after=retry_after)
            if 400 <= answer.status_code < 429:  # the checker minds; again would be for ever
                raise ValueError(answer.text)
            await asyncio.sleep(0.5)

    async def cancel(self, job_id: str) -> None:
        """Ask once, and again while the service is away."""
        for _ in range(20):
            t0 = time.time()
            answer = await self._ask("cancel", "POST", job_id, f"/v1/jobs/{job_id}/cancel", t0)
            if answer is not None and answer.status_code < 500:
                return
            await asyncio.sleep(0.5)

    async def watch(self, job_id: str) -> None:
        """Look at a job now and then until it has ended."""
        for _ in range(60):
            answer = await self._ask("view", "GET", job_id, f"/v1/jobs/{job_id}", time.time())
            if (
                answer is not None
                and answer.status_code == 200
                and answer.json()["state"]
                not in (
                    "queued",
                    "running",
                )
            ):
                return
            await asyncio.sleep(0.7)

    async def _ask(self, kind: str, method: str, job_id: str, path: str, t0: float) -> httpx.Response | None:
        # Any of the three keys may own the job; all are admins.
        headers = {"Authorization": f"Bearer {self._world.api_keys[0]}"}
        try:
            answer = await self._client.request(method, path, headers=headers)
        except httpx.HTTPError as error:
            self._history.add(kind, t0=t0, id=job_id, err=type(error).__name__)
            return None
        fields: dict[str, Any] = {"st": answer.status_code, "retry_after": answer.headers.get("retry-after")}
        if answer.status_code < 300:
            said = answer.json()
            fields |= {"state": said["state"], "cancel_requested": said.get("cancel_requested")}
        self._history.add(kind, t0=t0, id=job_id, **fields)
        return answer
