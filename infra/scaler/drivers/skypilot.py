"""Nodes as SkyPilot clusters of one machine each. Which cloud, region and price is SkyPilot's choice.

Tried with skypilot 0.14.1: `sky launch --async` returns at once and its server goes on (failing over between
the task's `any_of` entries); a cluster whose launch found nothing leaves the list, and the scaler gives it up
after `boot_seconds`.
"""

from collections.abc import Mapping
from pathlib import Path

from infra.scaler.driver import DriverError, Health, Rented
from infra.scaler.drivers.tool import call, parse

_HEALTH = {"INIT": Health.PENDING, "PENDING": Health.PENDING, "UP": Health.UP}
_MISSING = ("does not exist", "not found")  # `sky down` of a cluster that is gone already


class SkyPilot:
    """One pool: all clusters whose names start with `prefix`.

    task: the YAML of one node; it gets REEL_NODE_ID as an env. program: the `sky` to run, which may live in a
    virtual environment of its own. env: more of the task's envs, by name. secrets: the files of its secrets,
    by name; `sky` gets them through its environment, so no list of processes shows them.
    """

    def __init__(
        self,
        task: Path,
        prefix: str,
        program: str = "sky",
        env: Mapping[str, str] | None = None,
        secrets: Mapping[str, str] | None = None,
    ) -> None:
        if not task.is_file():
            raise ValueError(
                f"template: {task} is not there; expected a SkyPilot task such as infra/skypilot/node.yaml"
            )
        self._task = task
        self._prefix = prefix
        self._program = program
        self._env = [f"{name}={value}" for name, value in (env or {}).items()]
        self._secrets = {name: _secret(name, Path(path)) for name, path in (secrets or {}).items()}

    def machines(self) -> list[Rented]:
        """From `sky status --refresh`, so that a lost spot machine shows."""
        argv = [self._program, "status", "--refresh", "--output", "json"]
        found = parse(argv, call(argv))
        try:
            return [_rented(item) for item in found if item["name"].startswith(self._prefix)]
        except (KeyError, TypeError, ValueError) as error:
            raise DriverError(
                f"`sky status` answered in an unknown form ({error!r}); tried with 0.14.1"
            ) from error

    def add(self, name: str) -> None:
        """`sky launch --async`; a repeated call finds the cluster and changes nothing."""
        argv = [self._program, "launch", "--async", "--yes", "--fast", "--cluster", name]
        for pair in (f"REEL_NODE_ID={name}", *self._env):
            argv += ["--env", pair]
        for secret in self._secrets:
            argv += ["--secret", secret]
        call([*argv, str(self._task)], env=self._secrets)

    def remove(self, name: str) -> None:
        """`sky down`; a cluster that is gone already is fine."""
        try:
            call([self._program, "down", "--async", "--yes", name])
        except DriverError as error:
            if not any(word in str(error) for word in _MISSING):
                raise


def _secret(name: str, path: Path) -> str:
    """A secret's text. Raises ValueError, for a machine without it would cost money and serve nothing."""
    text = path.read_text().strip() if path.is_file() else ""
    if not text:
        raise ValueError(f"secrets: {name}: {path} is not there or empty; expected a file with the secret")
    return text


def _rented(item: dict[str, object]) -> Rented:
    status = str(item["status"])
    where = "/".join(str(item[key]) for key in ("cloud", "region") if item.get(key))
    health = _HEALTH.get(status, Health.LOST)
    if item.get("init_kind") == "unhealthy":
        health = Health.LOST
    return Rented(str(item["name"]), health, float(str(item.get("launched_at") or 0)), where=where)
