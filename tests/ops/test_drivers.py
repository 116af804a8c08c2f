"""Drivers against stand-ins of their tools (small programs that keep their clouds in a file), and the pool's
passes.
"""

import json
import random
import stat
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from infra.scaler.config import ConfigError, load, make_driver
from infra.scaler.driver import Driver, DriverError, Health, StockOut
from infra.scaler.drivers.kubernetes import Kubernetes
from infra.scaler.drivers.simulated import Offer, SimulatedCloud
from infra.scaler.drivers.skypilot import SkyPilot
from infra.scaler.policy import MachineState, Memory, Policy
from infra.scaler.reconcile import Pool, machine_name
from jobs.nodes import NodeInfo

TOOL = """#!{python}
import json, pathlib, sys
state = pathlib.Path({state!r})
cloud = json.loads(state.read_text()) if state.exists() else {{}}
args = sys.argv[1:]
with open({log!r}, "a") as log:
    log.write(json.dumps(args) + "\\n")
if (state.parent / "broken").exists():
    sys.exit("no credentials")
{body}
state.write_text(json.dumps(cloud))
"""
SKY = """
if args[0] == "status":
    print("Refreshing...")
    print(json.dumps([{"name": n, "status": s, "launched_at": 100, "cloud": "AWS", "region": "us-east-1",
                       "init_kind": None} for n, s in cloud.items()], indent=2))
elif args[0] == "launch":
    cloud.setdefault(args[args.index("--cluster") + 1], "INIT")
elif args[0] == "down":
    if args[-1] not in cloud:
        sys.exit(f"Cluster {args[-1]} does not exist")
    del cloud[args[-1]]
"""
KUBECTL = """
args = args[2:]
if args[0] == "get":
    print(json.dumps({"items": list(cloud.values())}))
elif args[0] == "apply":
    import yaml
    item = yaml.safe_load(sys.stdin)
    item["metadata"]["creationTimestamp"] = "1970-01-01T00:01:40Z"
    cloud.setdefault(item["metadata"]["name"], item)
elif args[0] == "delete":
    cloud.pop(args[2], None)
"""
TEMPLATE = (
    "kind: RayCluster\nmetadata:\n  name: ${REEL_NODE_ID}\n  labels:\n    reelserve/pool: ${REEL_POOL}\n"
)


@dataclass
class Tool:
    """A program that stands in for a cloud's own."""

    folder: Path
    program: Path

    @property
    def cloud(self) -> dict[str, object]:
        path = self.folder / "state.json"
        return json.loads(path.read_text()) if path.exists() else {}

    @cloud.setter
    def cloud(self, value: dict[str, object]) -> None:
        (self.folder / "state.json").write_text(json.dumps(value))

    def calls(self) -> list[list[str]]:
        path = self.folder / "log"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def tool(folder: Path, name: str, body: str) -> Tool:
    program = folder / name
    state, log = str(folder / "state.json"), str(folder / "log")
    program.write_text(TOOL.format(python=sys.executable, state=state, log=log, body=body))
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return Tool(folder, program)


@pytest.fixture
def sky(tmp_path: Path) -> tuple[SkyPilot, Tool]:
    (tmp_path / "node.yaml").write_text("name: node\n")
    made = tool(tmp_path, "sky", SKY)
    return SkyPilot(tmp_path / "node.yaml", "reel-m-", str(made.program)), made


@pytest.fixture
def kubernetes(tmp_path: Path) -> tuple[Kubernetes, Tool]:
    (tmp_path / "node.yaml").write_text(TEMPLATE)
    made = tool(tmp_path, "kubectl", KUBECTL)
    return Kubernetes(tmp_path / "node.yaml", "m", program=str(made.program)), made


@pytest.mark.parametrize("which", ["sky", "kubernetes"])
def test_calls_bear_repetition(which: str, request: pytest.FixtureRequest) -> None:
    driver, made = request.getfixturevalue(which)
    assert driver.machines() == []
    for _ in range(2):
        driver.add("reel-m-1")
    assert [(m.name, m.health, m.since) for m in driver.machines()] == [("reel-m-1", Health.PENDING, 100.0)]
    for _ in range(2):
        driver.remove("reel-m-1")
    assert driver.machines() == []
    (made.folder / "broken").touch()
    for act in (driver.machines, lambda: driver.add("x"), lambda: driver.remove("x")):
        with pytest.raises(DriverError, match="no credentials"):
            act()


def test_skypilot_health_names_and_arguments(sky: tuple[SkyPilot, Tool]) -> None:
    driver, made = sky
    made.cloud = {"reel-m-a": "UP", "reel-m-b": "STOPPED", "reel-m-c": "INIT", "somebody-elses": "UP"}
    found = {m.name: m.health for m in driver.machines()}
    assert found == {"reel-m-a": Health.UP, "reel-m-b": Health.LOST, "reel-m-c": Health.PENDING}
    assert driver.machines()[0].where == "AWS/us-east-1"
    driver.add("reel-m-d")
    call = made.calls()[-1]
    assert call[:2] == ["launch", "--async"]
    assert "REEL_NODE_ID=reel-m-d" in call


def test_skypilot_hands_over_secrets_and_shows_them_to_nobody(
    tmp_path: Path, sky: tuple[SkyPilot, Tool]
) -> None:
    _, made = sky
    (tmp_path / "url").write_text("rediss://node:pw@redis.example.com:6380\n")
    env = {"REEL_S3_ACCESS_KEY": "node", "REEL_MODEL_SOURCE": "s3://models/wan"}
    task, secrets = tmp_path / "node.yaml", {"REEL_REDIS_URL": str(tmp_path / "url")}
    real = made.program.read_text()
    made.program.write_text(
        real.replace(
            "import",
            f"import os\nopen({str(tmp_path / 'seen')!r}, 'w').write(os.environ['REEL_REDIS_URL'])\nimport",
            1,
        )
    )
    SkyPilot(task, "reel-m-", str(made.program), env, secrets).add("reel-m-d")
    call = made.calls()[-1]
    assert call[call.index("--secret") + 1] == "REEL_REDIS_URL"
    assert {"REEL_NODE_ID=reel-m-d", "REEL_S3_ACCESS_KEY=node", "REEL_MODEL_SOURCE=s3://models/wan"} <= {
        *call
    }
    assert not any("rediss://" in word for word in call)
    assert (tmp_path / "seen").read_text() == "rediss://node:pw@redis.example.com:6380"
    with pytest.raises(ValueError, match=r"secrets: REEL_REDIS_URL: .*none is not there or empty"):
        SkyPilot(task, "reel-m-", "sky", env, {"REEL_REDIS_URL": str(tmp_path / "none")})


def test_kubernetes_fills_the_template_and_reads_states(kubernetes: tuple[Kubernetes, Tool]) -> None:
    driver, made = kubernetes
    driver.add("reel-m-1")
    item = made.cloud["reel-m-1"]
    assert isinstance(item, dict)
    assert item["metadata"]["labels"] == {"reelserve/pool": "m"}
    for state, health in (("ready", Health.UP), ("failed", Health.LOST), ("", Health.PENDING)):
        made.cloud = {"reel-m-1": {**item, "status": {"state": state}}}
        assert driver.machines()[0].health is health
    made.cloud = {"reel-m-1": {**item, "metadata": {**item["metadata"], "deletionTimestamp": "now"}}}
    assert driver.machines()[0].health is Health.LOST


def test_a_missing_tool_and_nonsense_are_named(tmp_path: Path, sky: tuple[SkyPilot, Tool]) -> None:
    with pytest.raises(DriverError, match="not installed"):
        SkyPilot(tmp_path / "node.yaml", "p", "/nowhere/sky").machines()
    driver, made = sky
    made.program.write_text("#!/bin/sh\necho hello\n")
    with pytest.raises(DriverError, match="expected JSON"):
        driver.machines()
    made.program.write_text("#!/bin/sh\necho '[{\"cluster\": 1}]'\n")
    with pytest.raises(DriverError, match="unknown form"):
        driver.machines()


def test_a_template_without_names_is_refused(tmp_path: Path) -> None:
    (tmp_path / "node.yaml").write_text("metadata: {name: fixed}\n")
    with pytest.raises(ValueError, match="REEL_NODE_ID"):
        Kubernetes(tmp_path / "node.yaml", "m")
    with pytest.raises(ValueError, match="is not there"):
        SkyPilot(tmp_path / "none.yaml", "m")


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_simulated_cloud_sells_the_cheapest_in_stock_and_charges_by_the_second(rng: random.Random) -> None:
    clock = Clock()
    cloud = SimulatedCloud([Offer("dear", 30, 5, boot=100), Offer("cheap", 10, 1, boot=100)], clock, rng)
    for name in ("a", "b", "b"):
        cloud.add(name)
    assert {m.name: (m.where, m.health) for m in cloud.machines()} == {
        "a": ("cheap", Health.PENDING),
        "b": ("dear", Health.PENDING),
    }
    clock.now = 3600.0
    assert {m.health for m in cloud.machines()} == {Health.UP}
    assert cloud.cost() == pytest.approx(40)
    assert cloud.fail("dear") == ["b"]
    clock.now = 7200.0
    assert cloud.cost() == pytest.approx(50)  # the lost one costs no more
    with pytest.raises(StockOut):
        cloud.add("c")
    cloud.heal("dear")
    cloud.add("c")
    cloud.remove("a")
    cloud.remove("a")
    assert {m.name: m.health for m in cloud.machines()} == {"b": Health.LOST, "c": Health.PENDING}


@dataclass
class World:
    """A queue and registry by hand."""

    clock: Clock = field(default_factory=Clock)
    waiting: int = 0
    running: int = 0
    registry: dict[str, NodeInfo] = field(default_factory=dict)
    drained: list[str] = field(default_factory=list)

    def now(self) -> float:
        return self.clock()

    def load(self, model: str) -> tuple[int, int, float | None]:
        return self.waiting, self.running, 100.0

    def nodes(self, model: str) -> list[NodeInfo]:
        return list(self.registry.values())

    def drain(self, node_id: str) -> None:
        self.drained.append(node_id)
        if node_id in self.registry:
            self.registry[node_id].drain_requested = True

    def report(self, *names: str, **fields: object) -> None:
        for name in names:
            self.registry[name] = NodeInfo.model_validate(
                {"id": name, "model": "m", "state": "idle", "seen_at": self.now(), **fields}
            )


class Kept:
    """Memory as Redis would keep it: as text, over every restart."""

    def __init__(self) -> None:
        self.value = Memory()

    def load(self, model: str) -> Memory:
        return self.value

    def save(self, model: str, memory: Memory) -> None:
        self.value = memory


POLICY = Policy(target_wait=100, max_nodes=5, price_per_hour=10, remove_window=60, add_cooldown=30)


def pool(world: World, kept: Kept, driver: Driver, policy: Policy = POLICY) -> Pool:
    return Pool("m", policy, driver, world, kept)


def test_order_serve_drain_remove(rng: random.Random) -> None:
    world, kept = World(waiting=2), Kept()
    cloud = SimulatedCloud([Offer("c", 10, 9, boot=10)], world.clock, rng)
    names = sorted(
        {line.split()[1] for line in pool(world, kept, cloud).step().done if line.startswith("ordered")}
    )
    assert len(names) == 2
    assert sorted(m.name for m in cloud.machines()) == names
    world.clock.now = 40.0
    world.report(*names)
    assert pool(world, kept, cloud).step().decision.capacity == 2
    world.waiting, world.clock.now = 0, 200.0
    world.report(names[0], job_id="job_1", state="busy")
    assert pool(world, kept, cloud).step().decision.drain == (names[1], names[0])  # the idle one first
    assert world.drained[:2] == names[::-1] or set(world.drained) == set(names)
    world.registry[names[0]].state = "draining"
    del world.registry[names[1]]
    world.clock.now = 215.0
    assert pool(world, kept, cloud).step().decision.remove == (names[1],)
    assert [m.name for m in cloud.machines()] == [names[0]]  # its job still runs
    del world.registry[names[0]]
    pool(world, kept, cloud).step()
    assert cloud.machines() == []


class Deaf:
    """A cloud whose list lags: what is ordered shows only after `heard`."""

    def __init__(self, cloud: SimulatedCloud) -> None:
        self.cloud, self.heard = cloud, False

    def machines(self) -> list[object]:
        return self.cloud.machines() if self.heard else []  # type: ignore[return-value]

    def add(self, name: str) -> None:
        self.cloud.add(name)

    def remove(self, name: str) -> None:
        self.cloud.remove(name)


def test_an_order_is_not_repeated_while_the_clouds_list_lags_or_the_scaler_restarts(
    rng: random.Random,
) -> None:
    world, kept = World(waiting=3), Kept()
    deaf = Deaf(SimulatedCloud([Offer("c", 10, 9, boot=10)], world.clock, rng))
    for now in range(0, 400, 40):  # a new Pool each time: nothing but the memory is carried over
        world.clock.now = float(now)
        pool(world, kept, deaf).step()  # type: ignore[arg-type]
    assert len(deaf.cloud.machines()) == 3


class Dies(Exception):
    pass


@pytest.mark.parametrize("after", range(4))
def test_a_scaler_that_dies_between_orders_leaves_nothing_unknown(after: int, rng: random.Random) -> None:
    """It dies after `after` of four orders; its successor ends with four machines, all of them known."""
    world, kept = World(waiting=4), Kept()
    cloud = SimulatedCloud([Offer("c", 10, 9, boot=10)], world.clock, rng)
    driver = Deaf(cloud)
    driver.heard = True
    orders = iter([*[cloud.add] * after])

    def dying(name: str) -> None:
        act = next(orders, None)
        if act is None:
            raise Dies
        act(name)

    driver.add = dying  # type: ignore[method-assign]
    with pytest.raises(Dies):
        pool(world, kept, driver).step()  # type: ignore[arg-type]
    for now in range(40, 3000, 40):
        world.clock.now = float(now)
        world.report(*(m.name for m in cloud.machines() if m.health is Health.UP))
        pool(world, kept, cloud).step()
    assert len(cloud.machines()) == 4
    assert kept.value.orders == ()


def test_a_node_that_starts_while_its_drain_is_asked_is_asked_again(rng: random.Random) -> None:
    world, kept = World(waiting=1), Kept()
    cloud = SimulatedCloud([Offer("c", 10, 9, boot=10)], world.clock, rng)
    pool(world, kept, cloud).step()
    name = cloud.machines()[0].name
    world.waiting, world.clock.now = 0, 100.0
    assert pool(world, kept, cloud).step().decision.drain == (name,)
    world.report(name)  # it came up meanwhile, before the machine went
    decision = pool(world, kept, cloud).step().decision
    assert decision.remove == ()
    assert world.registry[name].drain_requested
    del world.registry[name]
    assert pool(world, kept, cloud).step().decision.remove == (name,)


def test_stock_outs_back_off_and_dry_run_changes_nothing(rng: random.Random) -> None:
    world, kept = World(waiting=3), Kept()
    cloud = SimulatedCloud([Offer("c", 10, 1, boot=10)], world.clock, rng)
    dry = pool(world, kept, cloud).step(dry_run=True)
    assert "would order 3" in dry.done
    assert kept.value == Memory()
    assert cloud.machines() == []
    done = pool(world, kept, cloud).step().done
    assert any("order failed (no cloud has such a machine): the next one in 60 s" in line for line in done)
    assert len(kept.value.orders) == 1
    world.clock.now = 35.0
    assert any("next one in 25 s" in line for line in pool(world, kept, cloud).step().done)


def test_a_machine_that_cannot_be_removed_is_tried_again(rng: random.Random) -> None:
    """And keeps the pass from nothing else."""
    world, kept = World(waiting=1), Kept()
    cloud = SimulatedCloud([Offer("c", 10, 9, boot=10)], world.clock, rng)
    pool(world, kept, cloud).step()
    (name,) = (m.name for m in cloud.machines())
    world.clock.now = 100.0
    world.report(name, state="stopped")
    stuck = Deaf(cloud)
    stuck.heard = True

    def refuse(name: str) -> None:
        raise DriverError("busy")

    stuck.remove = refuse  # type: ignore[method-assign]
    done = pool(world, kept, stuck).step().done  # type: ignore[arg-type]
    assert f"could not remove {name} (busy): again at the next pass" in done
    assert any(line.startswith("ordered ") for line in done)
    pool(world, kept, cloud).step()
    assert name not in {m.name for m in cloud.machines()}


def test_a_restored_redis_without_a_registry_costs_no_node(rng: random.Random) -> None:
    world, kept = World(waiting=2), Kept()
    cloud = SimulatedCloud([Offer("c", 10, 9, boot=10)], world.clock, rng)
    pool(world, kept, cloud).step()
    names = [m.name for m in cloud.machines()]
    world.clock.now = 100.0
    world.report(*names)
    pool(world, kept, cloud).step()
    world.registry.clear()
    world.clock.now = 115.0
    quiet = pool(world, kept, cloud).step()
    assert {m.state for m in quiet.seen.machines} == {MachineState.SILENT}
    assert (quiet.decision.add, quiet.decision.remove) == (0, ())
    world.report(*names)
    world.clock.now = 500.0
    assert pool(world, kept, cloud).step().decision.remove == ()


def test_a_foreign_node_that_fell_silent_is_no_capacity(rng: random.Random) -> None:
    """A dead node stays in the registry for a minute; the scaler replaces it after 15 seconds."""
    world, kept = World(waiting=1), Kept()
    cloud = SimulatedCloud([Offer("c", 10, 9, boot=10)], world.clock, rng)
    world.report("fixed")
    world.clock.now = 14.0
    assert pool(world, kept, cloud).step().decision.capacity == 1
    world.clock.now = 16.0
    silent = pool(world, kept, cloud).step().decision
    assert (silent.capacity, silent.add) == (0, 1)


def test_names_fit_every_cloud() -> None:
    for model in ("wan2.2-t2v-a14b", "Wan 2.2/T2V!" * 9, "..."):
        name = machine_name(model)
        assert len(name) <= 40
        assert name == name.lower()
        assert not set(name) - set("abcdefghijklmnopqrstuvwxyz0123456789-")


def test_the_example_file_loads_and_mistakes_are_named(tmp_path: Path) -> None:
    plan = load(Path("infra/scaler/example.toml"))
    assert [pool.driver for pool in plan.pools] == ["skypilot", "kubernetes"]
    assert plan.pools[0].policy == replace(
        plan.pools[0].policy, target_wait=600, min_nodes=1, max_nodes=20, budget_per_hour=400
    )
    good = '[[pool]]\nmodel = "m"\ndriver = "simulated"\ntarget_wait = 60\n'
    for text, words in (
        ("", "no \\[\\[pool\\]\\]"),
        ("[[pool]", "not TOML"),
        (good.replace("target_wait = 60", ""), "target_wait is missing"),
        (good.replace("simulated", "vmware"), "driver: got 'vmware'"),
        (good + "max_nodez = 4\n", "unknown max_nodez"),
        (good + 'max_nodes = "4"\n', "max_nodes: got '4', expected a number"),
        (good + "min_nodes = 20\n", "max_nodes: got 10"),
        (good + good, "more than one pool for m"),
        ("interval = 0\n" + good, "interval"),
    ):
        path = tmp_path / "scaler.toml"
        path.write_text(text)
        with pytest.raises(ConfigError, match=words):
            load(path)
    path.write_text(good)
    assert make_driver(load(path).pools[0], []).machines() == []
    with pytest.raises(ConfigError, match="is not there"):
        load(tmp_path / "none.toml")
