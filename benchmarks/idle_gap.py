"""How long the ranks have nothing to do between two jobs of a full queue.

    python benchmarks/idle_gap.py --jobs 40 --ranks 2

A real node (Ray, ranks, Redis, S3) with the tiny checkpoint, or the one that --model names. The gap is from
leaving the engine after one job to entering it for the next, by the ranks' own clock: the report, the claim,
the hand-over to the publisher and Ray's calls are in it; encoding, upload and webhooks are not, because they
go on beside the next job. The target is 0.5 % of a 60 s job, 300 ms.
"""

import argparse
import re
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from engine.tiny import make_tiny
from jobs.client import connect
from jobs.ids import new_id
from jobs.job import NewJob
from jobs.nodes import NodeRegistry
from jobs.settings import Settings
from jobs.store import JobStore
from tests.support.jobs import video_request
from tests.support.node import running_node, until
from tests.support.redis import redis_server
from tests.support.s3 import s3_server

JOB_SECONDS = 60.0  # of a video on a GPU node, for the percentage


def main() -> None:
    """Run the jobs, read the gaps from the node's log, and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=40)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--model", type=Path, default=None)
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="reel-gap-"))
    with redis_server("--appendonly", "yes") as redis, s3_server() as s3:
        settings = Settings(
            redis_url=redis.url,
            s3_endpoint=s3.endpoint,
            s3_access_key=s3.access_key,
            s3_secret_key=Settings(s3_secret_key=s3.secret_key).s3_secret_key,
            node_ranks=args.ranks,
            data_dir=folder / "data",
        )
        store = JobStore(connect(settings), settings)
        registry = NodeRegistry(store.redis)
        model = args.model or make_tiny(folder / "tiny")
        with running_node(settings, model, folder / "node.log") as node:
            until(lambda: [one for one in registry.list() if one.state == "idle"], 600, "the node")
            (card,) = registry.models()
            fields = {
                "model": card.name, "size": card.default_size, "frame_num": 9,
                "sampling_steps": card.default_sampling_steps,
            }  # fmt: skip
            ids = [
                store.submit(
                    NewJob(id=new_id("job"), key_id="bench", request=video_request(**fields, seed=seed))
                )[0].id
                for seed in range(args.jobs)
            ]
            until(lambda: all(store.get(one).terminal for one in ids), 3600, "the jobs")
            states = {store.get(one).state.value for one in ids}
            text = node.text()
    if states != {"succeeded"}:
        raise SystemExit(f"the jobs ended as {states}: no figure; see {folder / 'node.log'}")
    gaps = sorted(float(found) for found in re.findall(r"ranks idle for ([\d.]+) s", text))
    p50, worst = statistics.median(gaps), gaps[-1]
    print(
        f"{len(gaps)} gaps, {args.ranks} ranks, {card.name}: idle between two jobs "
        f"p50 {p50 * 1000:.1f} ms, p90 {gaps[int(len(gaps) * 0.9)] * 1000:.1f} ms, "
        f"max {worst * 1000:.1f} ms; "
        f"{100 * p50 / JOB_SECONDS:.3f} % of a {JOB_SECONDS:.0f} s job"
    )


if __name__ == "__main__":
    main()
