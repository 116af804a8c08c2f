"""Run by SkyPilot's own Python (.skypilot/): its parser and its optimizer on a task, without a cloud.

    python skypilot_plan.py TASK.yaml CLOUD...

Prints JSON: what the parser read, and what the optimizer would rent if the CLOUDs were enabled. Its catalogs
are downloads; here they are small files of this test's own, so that it needs neither network nor accounts.
Prices are made up: they only decide who is cheapest.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

os.environ["HOME"] = tempfile.mkdtemp(prefix="reel-sky-")
os.environ["SKYPILOT_DISABLE_USAGE_COLLECTION"] = "1"

import sky
from sky import check, dag, optimizer
from sky.catalog import constants
from sky.utils import registry

HEAD = "InstanceType,AcceleratorName,AcceleratorCount,vCPUs,MemoryGiB,Price,SpotPrice,Region,{zone}GpuInfo\n"
CATALOGS = {
    "common/accelerators.csv": "AcceleratorName,Clouds\nH100,\nH200,\nB200,\n",
    "lambda/vms.csv": HEAD.format(zone="") + "gpu_8x_h100,H100,8,208,1800,24,,us-east-1,\n",
    "nebius/vms.csv": HEAD.format(zone="")
    + "gpu-h200-sxm_8gpu-128vcpu-1600gb,H200,8,128,1600,28,14,eu-north1,\n",
    "runpod/vms.csv": HEAD.format(zone="AvailabilityZone,")
    + "8x_B200_SECURE,B200,8,200,1800,48,40,US,US-1,\n",
}


def read(task: "sky.Task") -> dict[str, object]:
    """What the parser made of the file."""
    return {
        "name": task.name,
        "nodes": task.num_nodes,
        "envs": sorted(task.envs),
        "secrets": sorted(task.secrets),
        "offers": sorted((*next(iter(one.accelerators.items())), one.use_spot) for one in task.resources),
    }


def rent(task: "sky.Task", clouds: list[str]) -> dict[str, object]:
    """The optimizer's choice."""
    enabled = [registry.CLOUD_REGISTRY.from_str(name) for name in clouds]
    check.get_cached_enabled_clouds_or_refresh = lambda *args, **options: enabled
    with dag.Dag() as plan:
        plan.add(task)
    optimizer.Optimizer.optimize(plan, quiet=True)
    best = task.best_resources
    return {"cloud": str(best.cloud), "gpus": dict(best.accelerators), "spot": best.use_spot,
            "price": best.get_cost(3600)}  # fmt: skip


def main() -> None:
    """The program."""
    for name, text in CATALOGS.items():
        path = Path(os.environ["HOME"], ".sky/catalogs", constants.CATALOG_SCHEMA_VERSION, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    task = sky.Task.from_yaml(sys.argv[1])
    print(json.dumps({"read": read(task), "rented": rent(task, sys.argv[2:]) if sys.argv[2:] else None}))


if __name__ == "__main__":
    main()
