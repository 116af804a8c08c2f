"""Which nodes there are, what they do, which should drain, and the models they serve."""

from typing import Any, Literal

from pydantic import BaseModel, Field
from redis.exceptions import WatchError

from jobs.client import RedisClient, guard, redis_now, require_text
from jobs.job import ModelCard, jsonable
from jobs.scripts import PREFIX

NODE_SECONDS = 60  # a node silent for this long is no longer listed
DRAIN_SECONDS = 86_400  # a drain wish outlives its node by at most this
MODELS = f"{PREFIX}models"

NodeState = Literal["starting", "idle", "busy", "draining", "stopped"]
SERVING = frozenset({"idle", "busy"})


class GpuUse(BaseModel):
    """One GPU, as its driver saw it a few seconds ago."""

    index: int
    busy: float  # 0-1: share of the time in which a kernel ran
    memory_used: int  # bytes
    memory_total: int  # bytes


class NodeInfo(BaseModel):
    """One node. Times are Unix seconds by the Redis clock."""

    id: str
    model: str
    ranks: int = 1  # GPUs, or CPU processes
    host: str = ""
    device: str = ""  # such as "NVIDIA H100 80GB HBM3" or "cpu"
    version: str = ""  # of reelserve
    layout: str = ""  # guidance x ulysses, such as "2x4"
    state: NodeState = "starting"
    job_id: str | None = None  # on the GPUs
    publishing_job_id: str | None = None  # encoding and uploading
    started_at: float = 0.0
    seen_at: float = 0.0
    drain_requested: bool = False
    memory_used: int | None = None  # bytes over all ranks: of the GPUs, or resident on a CPU
    memory_total: int | None = None
    step_seconds: float | None = None  # one denoising step of the last finished video
    labels: dict[str, str] = Field(default_factory=dict)  # cloud, region, instance, ...
    gpus: list[GpuUse] = Field(default_factory=list)  # empty on a CPU


class NodeRegistry:
    """Plain commands: a node only ever writes its own entry."""

    def __init__(self, redis: RedisClient) -> None:
        require_text(redis)
        self.redis = redis

    def register(self, node: NodeInfo) -> NodeInfo:
        """Announce a node, or announce it again; its times are set here."""
        with guard():
            now = redis_now(self.redis)
        node = node.model_copy(update={"started_at": node.started_at or now, "seen_at": now})
        self._write(node)
        return node

    def beat(self, node_id: str, state: NodeState, job_id: str | None = None, **changes: Any) -> bool:
        """Say that the node lives, in `state`, with `job_id` on its GPUs; `changes`: other NodeInfo fields.

        False when the node is not registered any more (it was silent too long): register again.
        """
        node = self.get(node_id)
        if node is None:
            return False
        with guard():
            now = redis_now(self.redis)
        fields = {**node.model_dump(), "state": state, "job_id": job_id, "seen_at": now, **changes}
        self._write(NodeInfo.model_validate(fields))
        return True

    def get(self, node_id: str) -> NodeInfo | None:
        """One node, or None when it is unknown or silent for NODE_SECONDS."""
        with guard():
            text, drain = self.redis.execute_command("MGET", _node(node_id), _drain(node_id))
        return _parse(text, drain) if text else None

    def list(self) -> "Nodes":
        """All nodes heard of within NODE_SECONDS, by id."""
        with guard():
            ids = sorted(self.redis.execute_command("ZRANGE", f"{PREFIX}nodes", 0, -1))
            if not ids:
                return []
            keys = [name for node_id in ids for name in (_node(node_id), _drain(node_id))]
            texts = self.redis.execute_command("MGET", *keys)
            silent = [node_id for node_id, text in zip(ids, texts[::2], strict=True) if not text]
            if silent:
                self.redis.execute_command("ZREM", f"{PREFIX}nodes", *silent)
        return [_parse(text, drain) for text, drain in zip(texts[::2], texts[1::2], strict=True) if text]

    def remove(self, node_id: str) -> None:
        """Sign a node off, with its drain wish."""
        with guard():
            self.redis.execute_command("DEL", _node(node_id), _drain(node_id))
            self.redis.execute_command("ZREM", f"{PREFIX}nodes", node_id)

    def request_drain(self, node_id: str) -> bool:
        """Ask a node to take nothing new and stop when done. False: no such node."""
        known = self.get(node_id) is not None
        if known:
            with guard():
                self.redis.execute_command("SET", _drain(node_id), "1", "EX", DRAIN_SECONDS)
        return known

    def cancel_drain(self, node_id: str) -> None:
        """Take a drain wish back."""
        with guard():
            self.redis.execute_command("DEL", _drain(node_id))

    def drain_requested(self, node_id: str) -> bool:
        """Whether somebody asked the node to drain."""
        with guard():
            return bool(self.redis.execute_command("EXISTS", _drain(node_id)))

    def publish_model(self, card: ModelCard) -> None:
        """Announce a model; the latest card of a name wins, and stays when its nodes go: jobs can wait."""
        with guard():
            self.redis.execute_command("HSET", MODELS, card.name, card.model_dump_json(by_alias=True))

    def withdraw_model(self, name: str) -> bool:
        """Stop accepting jobs for a model. False: it was not announced."""
        with guard():
            return bool(self.redis.execute_command("HDEL", MODELS, name))

    def retire_model(self, name: str) -> "Nodes":
        """Withdraw a model that no node serves; else leave it and return the nodes that do.

        A node announces itself before its card, and the card is watched: one that comes meanwhile is seen, or
        its card counts. Raises KeyError when the model was not announced.
        """
        while True:
            with guard(), self.redis.pipeline(transaction=True) as pipe:
                pipe.watch(MODELS)
                serving = [node for node in self.list() if node.model == name and node.state != "stopped"]
                if serving:
                    return serving
                pipe.multi()
                pipe.execute_command("HDEL", MODELS, name)
                try:
                    (removed,) = pipe.execute()
                except WatchError:
                    continue
            if not removed:
                raise KeyError(name)
            return []

    def live_models(self, within: float) -> frozenset[str]:
        """Announced models that a node serves which was heard of within so many seconds (Redis clock)."""
        with guard():
            now = redis_now(self.redis)
        serving = {
            node.model for node in self.list() if node.state in SERVING and now - node.seen_at <= within
        }
        return frozenset(serving & {card.name for card in self.models()}) if serving else frozenset()

    def models(self) -> "Cards":
        """All model cards, by name."""
        with guard():
            texts = self.redis.execute_command("HVALS", MODELS)
        return sorted((ModelCard.model_validate_json(text) for text in texts), key=lambda card: card.name)

    def _write(self, node: NodeInfo) -> None:
        with guard():
            text = NodeInfo.model_validate({**jsonable(node), "drain_requested": False}).model_dump_json()
            self.redis.execute_command("SET", _node(node.id), text, "EX", NODE_SECONDS)
            self.redis.execute_command("ZADD", f"{PREFIX}nodes", node.seen_at, node.id)


Nodes = list[NodeInfo]
Cards = list[ModelCard]


def _node(node_id: str) -> str:
    return f"{PREFIX}node:{node_id}"


def _drain(node_id: str) -> str:
    return f"{PREFIX}drain:{node_id}"


def _parse(text: str, drain: str | None) -> NodeInfo:
    return NodeInfo.model_validate_json(text).model_copy(update={"drain_requested": bool(drain)})
