"""The scaler's file: one ``[[pool]]`` a model, in TOML. `infra/scaler/example.toml` shows every field."""

import random
import time
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from infra.scaler.driver import Driver
from infra.scaler.drivers.kubernetes import Kubernetes
from infra.scaler.drivers.local import LocalNodes
from infra.scaler.drivers.simulated import Offer, SimulatedCloud
from infra.scaler.drivers.skypilot import SkyPilot
from infra.scaler.policy import Policy

INFRA = Path(__file__).resolve().parents[1]
POLICY = {field.name for field in fields(Policy)}
DRIVERS = {
    "skypilot": {"template", "program", "env", "secrets"},
    "kubernetes": {"template", "program", "namespace"},
    "simulated": {"node_model", "boot", "stock", "logs"},
}


class ConfigError(ValueError):
    """The file is wrong; the text says where, what came and what is expected."""


@dataclass(frozen=True)
class PoolConfig:
    """One model's pool: where its nodes come from and what they may be. options: the driver's own."""

    model: str
    driver: str
    policy: Policy
    options: Mapping[str, Any]


@dataclass(frozen=True)
class ScalerConfig:
    """The whole file. interval: seconds between passes."""

    interval: float
    pools: tuple[PoolConfig, ...]


def load(path: Path) -> ScalerConfig:
    """Read the file. Raises ConfigError."""
    try:
        data = tomllib.loads(path.read_text())
    except FileNotFoundError:
        raise ConfigError(f"{path} is not there; copy infra/scaler/example.toml and adapt it") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not TOML: {error}") from None
    _only(data, {"interval", "pool"}, str(path))
    interval = _number(data.get("interval", 15.0), "interval")
    if interval <= 0:
        raise ConfigError(f"{path}: interval: got {interval}, expected more than 0 seconds")
    tables = data.get("pool", [])
    if not isinstance(tables, list) or not tables:
        raise ConfigError(f"{path}: no [[pool]]; expected one for each model")
    pools = tuple(_pool(table, f"{path}: pool {place}") for place, table in enumerate(tables, 1))
    models = [pool.model for pool in pools]
    if twice := {model for model in models if models.count(model) > 1}:
        raise ConfigError(f"{path}: more than one pool for {', '.join(sorted(twice))}; expected one a model")
    return ScalerConfig(interval, pools)


def _pool(table: dict[str, Any], where: str) -> PoolConfig:
    for name in ("model", "driver", "target_wait"):
        if name not in table:
            raise ConfigError(f"{where}: {name} is missing")
    driver = table["driver"]
    if driver not in DRIVERS:
        raise ConfigError(f"{where}: driver: got {driver!r}, expected one of {', '.join(sorted(DRIVERS))}")
    options = DRIVERS[driver]
    _only(table, {"model", "driver"} | POLICY | options, where)
    numbers = {name: _number(table[name], f"{where}: {name}") for name in sorted(POLICY & table.keys())}
    for name in ("min_nodes", "max_nodes", "max_add"):
        if name in numbers:
            numbers[name] = int(numbers[name])
    try:
        policy = Policy(**numbers)  # type: ignore[arg-type]
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from None
    return PoolConfig(str(table["model"]), driver, policy, {k: v for k, v in table.items() if k in options})


def _only(table: Mapping[str, Any], known: set[str], where: str) -> None:
    if unknown := sorted(table.keys() - known):
        raise ConfigError(f"{where}: unknown {', '.join(unknown)}; expected {', '.join(sorted(known))}")


def _number(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{where}: got {value!r}, expected a number")
    return value


def make_driver(pool: PoolConfig, stack: list[LocalNodes]) -> Driver:
    """The pool's driver. Local nodes that it may start are appended to `stack`, to be stopped at the end.

    Raises ConfigError.
    """
    options = dict(pool.options)
    try:
        if pool.driver == "skypilot":
            task = Path(options.get("template", INFRA / "skypilot/node.yaml"))
            more = (_texts(options, "env"), _texts(options, "secrets"))
            return SkyPilot(task, f"reel-{_slug(pool.model)}-", options.get("program", "sky"), *more)
        if pool.driver == "kubernetes":
            template = Path(options.get("template", INFRA / "kuberay/node.yaml"))
            namespace, program = options.get("namespace", "reelserve"), options.get("program", "kubectl")
            return Kubernetes(template, _slug(pool.model), namespace, program)
    except ValueError as error:
        raise ConfigError(f"pool {pool.model}: {error}") from None
    return _simulated(pool, options, stack)


def _texts(options: Mapping[str, Any], name: str) -> dict[str, str]:
    """A table of texts. Raises ValueError."""
    table = options.get(name, {})
    if not isinstance(table, dict) or not all(isinstance(value, str) for value in table.values()):
        raise ValueError(f"{name}: got {table!r}, expected a table of texts by name")
    return table


def _simulated(pool: PoolConfig, options: dict[str, Any], stack: list[LocalNodes]) -> Driver:
    machines = None
    if "node_model" in options:
        machines = LocalNodes(Path(options["node_model"]), Path(options.get("logs", ".reel/scaler")))
        stack.append(machines)
    boot, stock = float(options.get("boot", 10.0)), int(options.get("stock", pool.policy.max_nodes))
    offer = Offer("simulated", pool.policy.price_per_hour, stock, boot)
    return SimulatedCloud([offer], time.time, random.Random(), machines)


def _slug(model: str) -> str:
    from infra.scaler.reconcile import slug

    return slug(model)
