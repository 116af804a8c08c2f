"""Faults of those whom the service calls: S3 answers badly, webhook receivers too."""

import asyncio
import random

from tests.chaos.history import History
from tests.chaos.injector import Injector
from tests.chaos.load import Load
from tests.chaos.receiver import HookFault
from tests.chaos.s3_wire import S3Fault
from tests.chaos.world import World


class PeerFaults(Injector):
    """Uploads and webhooks that fail on the other side."""

    def __init__(self, world: World, load: Load, history: History, rng: random.Random) -> None:
        super().__init__(world, load, history, rng)
        bind = self.bind
        self.lanes = {
            "s3": {f"s3 {kind}": bind(self.s3_fault, kind) for kind in ("503", "hang", "partial")},
            "webhooks": {
                **{f"webhook {kind}": bind(self.hook_fault, kind) for kind in ("hang", "500", "429")},
                "webhook 410": self.hook_gone,
            },
        }

    async def s3_fault(self, kind: str) -> None:
        """The next upload fails in this way."""
        fault = S3Fault(kind)
        self.world.s3.faults.append(fault)
        try:
            await asyncio.wait_for(fault.hit.wait(), 10)
            self.history.fault(f"s3 {kind}", key=fault.key)
        except TimeoutError:
            if fault in self.world.s3.faults:
                self.world.s3.faults.remove(fault)

    async def hook_fault(self, kind: str) -> None:
        """The next webhook is answered in this way, or not at all."""
        fault = HookFault(kind)
        self.world.receiver.faults.append(fault)
        try:
            await asyncio.wait_for(fault.hit.wait(), 10)
            self.history.fault(f"webhook {kind}", job=fault.job)
        except TimeoutError:
            if fault in self.world.receiver.faults:
                self.world.receiver.faults.remove(fault)

    async def hook_gone(self) -> None:
        """An endpoint that answers 410: it must never be posted to again."""
        path = f"/gone/{self.load.sent}"
        hit = self.world.receiver.gone[path] = asyncio.Event()
        job_id = await self.load.submit(callback_url=self.world.receiver.url(path), priority="high")
        await asyncio.wait_for(hit.wait(), 60)
        self.history.fault("webhook 410", job=job_id, path=path)
