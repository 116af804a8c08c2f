"""The node actor: puts a node's parts together and answers its host. The work is in threads."""

import logging
import os
import platform
import socket
import threading
import time
from importlib.metadata import version

from ray.util.placement_group import PlacementGroup

from engine.config import ModelSpec
from jobs.client import connect
from jobs.errors import JobNotFound, StoreUnavailable
from jobs.job import Job, JobState, ModelCard
from jobs.nodes import NodeInfo, NodeRegistry, NodeState
from jobs.storage import ObjectStore
from jobs.store import JobStore
from worker.claims import ClaimLoop
from worker.drain import Drain
from worker.gpus import GpuMeter
from worker.group import GroupBroken, RankGroup
from worker.lease import tell
from worker.logs import join_logs
from worker.plan import NodePlan, NodeStatus
from worker.presets import preset_cards
from worker.publish import Finished, Publisher
from worker.reports import BadModel
from worker.spool import Spool
from worker.vitals import Memory, total_memory

BEAT_SECONDS = 1.0
VITALS_SECONDS = 5.0  # how often memory is looked at
STOP_SECONDS = 20.0  # for ranks to reach a step boundary after the drain's grace, before they are killed
log = logging.getLogger(__name__)


class NodeActor:
    """One per cluster. `start` returns at once; `status` says how it goes."""

    def __init__(self, plan: NodePlan, placement: PlacementGroup) -> None:
        join_logs(plan)
        self.plan = plan
        redis = connect(plan.settings)
        self.store = JobStore(redis, plan.settings)
        self.registry = NodeRegistry(redis)
        self.storage = ObjectStore(plan.settings)
        self.spool = Spool(plan.work_dir)
        self.drain_wish = Drain()
        self.publisher = Publisher(self.store, self.storage, self.spool, self.drain_wish)
        self.group = RankGroup(plan, placement)
        self.loop: ClaimLoop | None = None  # None until the ranks are up
        self.info = NodeInfo(id=plan.node_id, model="", ranks=plan.ranks, host=socket.gethostname())
        self.meter = GpuMeter()
        self.card: ModelCard | None = None  # None until the ranks have read the model
        self._status = NodeStatus("starting")
        self._memory: Memory | None = None

    def start(self) -> None:
        """Start the node's threads."""
        threading.Thread(target=self._live, name="claims", daemon=True).start()

    def status(self) -> NodeStatus:
        """For the host, which ends the cluster when it is stopped, broken or fatal."""
        return self._status

    def drain(self, grace: float) -> None:
        """Take nothing new; finish within `grace` seconds or give back what runs."""
        log.info("draining, %.0f s", grace)
        self.drain_wish.ask(grace)

    def _live(self) -> None:
        """The node's life, in the thread "claims"."""
        try:
            self._recover()
            began = time.monotonic()
            spec = self.group.start()
            self._register(spec)
            log.info(
                "node %s serves %s, up in %.1f s",
                self.plan.node_id,
                self.info.model,
                time.monotonic() - began,
            )
            self.loop = ClaimLoop(
                self.info.model, self.plan.node_id, self.store, self.storage,
                self.group, self.publisher, self.spool, self.drain_wish,
            )  # fmt: skip
            self._status = NodeStatus("serving")
            threading.Thread(target=self._beat_for_ever, name="beat", daemon=True).start()
            threading.Thread(target=self._look_for_ever, name="vitals", daemon=True).start()
            self.loop.run()
            tell(lambda: self.registry.remove(self.plan.node_id), 5.0)
            self._status = NodeStatus("stopped")
        except BadModel as error:
            self._status = NodeStatus("fatal", str(error))
        except GroupBroken as error:
            self._status = NodeStatus("broken", str(error))
        except Exception as error:
            log.exception("the node's main thread failed")
            self._status = NodeStatus("broken", f"{type(error).__name__}: {error}")

    def _recover(self) -> None:
        """Publish what an earlier cluster of this node finished but did not commit, if it is still ours.

        What Redis can't be asked about stays: a claim of its job finds it, or the next start.
        """
        away = False
        for job_id, token, folder in self.spool.tidy():
            found = None if away else tell(lambda job_id=job_id: look_up(self.store, job_id))  # type: ignore[misc]
            if found is None:
                away = True
                log.warning("job %s: Redis can't say whose its video is; it is kept", job_id)
                continue
            job = found[0] if found else None
            if job is None or (job.terminal and job.state is not JobState.FAILED):
                self.spool.drop(job_id)
            elif (job.state, job.owner, job.token) == (JobState.RUNNING, self.plan.node_id, token):
                log.info("job %s: publishing what an earlier cluster finished", job_id)
                self.publisher.take(Finished(job, folder))

    def _register(self, spec: ModelSpec) -> None:
        self.card = card = model_card(spec, self.plan.name)
        self.info = self.info.model_copy(
            update={
                "model": card.name,
                "device": device_name(self.plan),
                "version": version("reelserve"),
                "state": "idle",
            }
        )
        while tell(self._announce) is None:
            log.warning("cannot register yet")

    def _announce(self) -> bool:
        """Itself first: who withdraws the model then sees this node, or is followed by the card."""
        assert self.card is not None
        self.registry.register(self.info)
        self.registry.publish_model(self.card)
        return True

    def _beat_for_ever(self) -> None:
        while self._status.state == "serving":
            try:
                self._beat()
            except StoreUnavailable as error:
                log.warning("no node heartbeat: %s", error)
            self._enforce_drain()
            time.sleep(BEAT_SECONDS)

    def _look_for_ever(self) -> None:
        """A thread of its own: asking the driver may take seconds, which no beat must wait for."""
        while self._status.state == "serving":
            if self.plan.device == "cuda":
                self.meter.sample()
            self._memory = total_memory(self.meter.latest, self.group.processes)
            time.sleep(VITALS_SECONDS)

    def _beat(self) -> None:
        assert self.loop is not None
        job, publishing = self.loop.job, self.publisher.job
        state: NodeState = "draining" if self.drain_wish.asked else "busy" if job else "idle"
        known = self.registry.beat(
            self.plan.node_id,
            state,
            job.id if job else None,
            publishing_job_id=publishing.id if publishing else None,
            memory_used=self._memory.used if self._memory else None,
            memory_total=self._memory.total if self._memory else None,
            step_seconds=self.publisher.step_seconds,
            gpus=self.meter.latest,
        )
        if not known:
            self._announce()  # with the model, which may have been withdrawn while nobody served it
        if not self.drain_wish.asked and self.registry.drain_requested(self.plan.node_id):
            self.drain(self.plan.settings.drain_seconds)

    def _enforce_drain(self) -> None:
        """After the grace, stop the ranks at a step boundary; a little later, kill them."""
        assert self.loop is not None
        if self.loop.job is None or self.drain_wish.overdue < 0:
            return
        if self.drain_wish.overdue < STOP_SECONDS:
            self.group.stop("drain")
        else:
            self.group.kill()


def look_up(store: JobStore, job_id: str) -> list[Job]:
    """The job, or nothing when there is none; for `tell`, whose None may also mean that Redis is away."""
    try:
        return [store.get(job_id)]
    except JobNotFound:
        return []


def model_card(spec: ModelSpec, name: str | None) -> ModelCard:
    """What the API needs to know of a model."""
    sizes = [f"{width}*{height}" for width, height in spec.sizes]
    return ModelCard(
        name=name or spec.name,
        task=spec.task,
        sizes=sizes,
        fps=spec.fps,
        default_size=sizes[0],
        default_frame_num=spec.frame_num,
        max_frame_num=spec.max_frame_num,
        default_shift=spec.shift,
        default_sampling_steps=spec.sampling_steps,
        default_guide_scale=spec.guide_scale,
        loras=list(spec.loras),
        presets=preset_cards(spec),
    )


def device_name(plan: NodePlan) -> str:
    """Such as "NVIDIA H100 80GB HBM3", or the CPU's architecture."""
    if plan.device == "cuda":
        import torch

        return str(torch.cuda.get_device_name())
    return f"cpu {platform.machine()}, {os.cpu_count()} cores"
