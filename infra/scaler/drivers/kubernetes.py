"""Nodes as KubeRay RayClusters of one pod each, through kubectl: a named node can go, not just "one fewer".

The template's text has ``${REEL_NODE_ID}`` where the name goes. All objects of a pool carry the label
``reelserve/pool``; the rest (who may, where, which GPUs) is the template's and the cluster's business.
"""

from datetime import datetime
from pathlib import Path

from infra.scaler.driver import DriverError, Health, Rented
from infra.scaler.drivers.tool import call, parse

PLACE = "${REEL_NODE_ID}"
POOL = "${REEL_POOL}"
_HEALTH = {"ready": Health.UP, "failed": Health.LOST, "suspended": Health.LOST}


class Kubernetes:
    """One pool: the RayClusters with the pool's label in one namespace."""

    def __init__(
        self, template: Path, pool: str, namespace: str = "reelserve", program: str = "kubectl"
    ) -> None:
        if not template.is_file():
            raise ValueError(
                f"template: {template} is not there; expected one such as infra/kuberay/node.yaml"
            )
        self._text = template.read_text()
        for place in (PLACE, POOL):
            if place not in self._text:
                raise ValueError(
                    f"template: {template} has no {place}, so its nodes would have no names of their own"
                )
        self._pool = pool
        self._base = [program, "--namespace", namespace]

    def machines(self) -> list[Rented]:
        """From `kubectl get rayclusters`."""
        argv = [*self._base, "get", "rayclusters", "-l", f"reelserve/pool={self._pool}", "-o", "json"]
        found = parse(argv, call(argv))
        try:
            return [_rented(item) for item in found["items"]]
        except (KeyError, TypeError, ValueError) as error:
            raise DriverError(
                f"kubectl answered in an unknown form ({error!r}), expected a list of RayClusters"
            ) from error

    def add(self, name: str) -> None:
        """`kubectl apply`; a repeated call changes nothing."""
        call(
            [*self._base, "apply", "-f", "-"], text=self._text.replace(PLACE, name).replace(POOL, self._pool)
        )

    def remove(self, name: str) -> None:
        """`kubectl delete`; the pod then has its grace period, though a drained node needs none of it."""
        call([*self._base, "delete", "raycluster", name, "--ignore-not-found", "--wait=false"])


def _rented(item: dict[str, dict[str, str]]) -> Rented:
    meta, status = item["metadata"], item.get("status", {})
    since = datetime.fromisoformat(meta["creationTimestamp"].replace("Z", "+00:00")).timestamp()
    health = _HEALTH.get(status.get("state", ""), Health.PENDING)
    return Rented(
        meta["name"], Health.LOST if "deletionTimestamp" in meta else health, since, where="kubernetes"
    )
