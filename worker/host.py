"""The cluster's host process: Ray's driver. Starts the cluster and the node actor, and watches both.

Run by the supervisor as `python -m worker.host`; see there for who ends whom.
"""

import logging
import os
import pickle
import shutil
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil

from worker.plan import NodePlan, grace_seconds
from worker.processes import adopt_orphans, alive, kill_descendants
from worker.supervisor import EXIT_DONE, EXIT_FATAL, EXIT_REBUILD

WATCH_SECONDS = 0.25
ANSWER_SECONDS = 60.0  # a node actor silent for longer is taken for dead
log = logging.getLogger(__name__)


class ClusterBroke(Exception):
    """A part of the cluster died or hangs: it has to be rebuilt whole."""


def main() -> int:
    """Host one cluster; the exit code tells the supervisor what to do next."""
    adopt_orphans()
    plan: NodePlan = pickle.load(sys.stdin.buffer)
    orders = Orders(plan.run_dir)
    threading.Thread(target=orders.read, name="leash", daemon=True).start()

    from jobs.log import setup_logging

    setup_logging("node", plan.settings.log_level)
    try:
        return host(plan, orders)
    except ClusterBroke as broke:
        log.error("cluster broke: %s", broke)
    except Exception:
        log.exception("the cluster did not come up")
    while orders.cut:
        time.sleep(1.0)
    return EXIT_REBUILD


def host(plan: NodePlan, orders: "Orders") -> int:
    """Start everything, then watch until the node is drained. Raises ClusterBroke."""
    import ray

    from worker import cluster
    from worker.node import NodeActor

    started = time.monotonic()
    placement = cluster.start(plan)
    vital = cluster.vital_processes()
    log.info("cluster up in %.1f s", time.monotonic() - started)
    node: Any = (
        ray.remote(NodeActor).options(num_cpus=0, max_concurrency=8, max_restarts=0).remote(plan, placement)
    )
    node.start.remote()
    told: str | None = None
    while True:
        check(vital)
        status = ask(node)
        if status.state == "stopped":
            return EXIT_DONE
        if status.state == "fatal":
            print(f"reel node: {status.detail}", file=sys.stderr, flush=True)
            return EXIT_FATAL
        if status.state == "broken":
            raise ClusterBroke(status.detail)
        if orders.word != told:
            told = orders.word
            node.drain.remote(grace=grace_seconds(told or "stop", plan.settings))
        orders.changed.wait(WATCH_SECONDS)
        orders.changed.clear()


def check(vital: list[psutil.Process]) -> None:
    """Raise ClusterBroke when one of the cluster's vital processes has ended."""
    for process in vital:
        if not alive(process):
            raise ClusterBroke(f"process {process.pid} of the cluster ended")


def ask(node: Any) -> Any:
    """The node actor's status. Raises ClusterBroke when it is dead or does not answer."""
    import ray

    try:
        return ray.get(node.status.remote(), timeout=ANSWER_SECONDS)
    except (ray.exceptions.RayError, TimeoutError) as error:
        raise ClusterBroke(f"the node actor does not answer ({type(error).__name__})") from error


class Orders:
    """What the supervisor asks for, read from stdin; its end means that the supervisor is gone."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.word: str | None = None
        self.cut = False  # the supervisor is gone: the leash's thread ends everything
        self.changed = threading.Event()

    def read(self) -> None:
        """Follow stdin until its end, then take everything down with us."""
        for line in sys.stdin.buffer:
            self.word = line.decode().strip()
            self.changed.set()
        self.cut = True
        kill_descendants()
        shutil.rmtree(self.run_dir, ignore_errors=True)  # nobody else is left to do it
        os._exit(EXIT_REBUILD)


if __name__ == "__main__":
    code = main()
    kill_descendants()  # quicker than ray.shutdown(), and nothing in the cluster is worth a farewell
    sys.stdout.flush()
    os._exit(code)
