"""One node's own Ray cluster: started here, watched here, never shared, gone with its supervisor."""

import time
from pathlib import Path

import psutil
import ray
from ray.util.placement_group import PlacementGroup, placement_group

from worker.plan import NodePlan

OBJECT_STORE_BYTES = (
    128 * 2**20
)  # only control messages pass through it: frames go to ffmpeg, latents stay on GPUs
VITAL = ("gcs_server", "raylet", "DashboardAgent", "RuntimeEnvAgent")  # the raylet dies with either agent
START_SECONDS = 90.0


def start(plan: NodePlan) -> PlacementGroup:
    """Start the cluster and reserve one bundle per rank, all on this machine (STRICT_PACK).

    Token authentication, logging and the rest of Ray's environment come from `ray_environment`; the dashboard
    is off.
    Raises RuntimeError when Ray does not come up.
    """
    ray.init(
        address="local",
        num_cpus=plan.ranks + 1,
        num_gpus=plan.ranks if plan.device == "cuda" else 0,
        include_dashboard=False,
        log_to_driver=False,
        configure_logging=False,
        object_store_memory=OBJECT_STORE_BYTES,
        _temp_dir=str(plan.run_dir / "ray"),
        _node_ip_address="127.0.0.1",
    )
    bundle = {"CPU": 1, "GPU": 1} if plan.device == "cuda" else {"CPU": 1}
    group: PlacementGroup = placement_group([bundle] * plan.ranks, strategy="STRICT_PACK")
    if not group.wait(START_SECONDS):
        raise RuntimeError(
            f"Ray could not place {plan.ranks} ranks on one machine within {START_SECONDS:.0f} s"
        )
    return group


def vital_processes(timeout: float = 30.0) -> list[psutil.Process]:
    """The cluster's processes without which it can't go on; their end means a rebuild.

    Waits for the agents, which the raylet starts a little later. Raises RuntimeError when one is missing.
    """
    end = time.monotonic() + timeout
    while True:
        found = {name: process for process in _family() if (name := _vital_name(process))}
        if len(found) == len(VITAL):
            return list(found.values())
        if time.monotonic() > end:
            raise RuntimeError(f"Ray started without {sorted(set(VITAL) - set(found))}")
        time.sleep(0.1)


def _family() -> list[psutil.Process]:
    family: list[psutil.Process] = psutil.Process().children(recursive=True)
    return family


def _vital_name(process: psutil.Process) -> str | None:
    """Which vital process this is: by its program's file name, or by the title that Ray gave it."""
    try:
        words = process.cmdline()
    except psutil.Error:
        return None
    first = Path(words[0]).name if words else ""
    title = first.removeprefix("ray::").strip()
    return title if title in VITAL else None
