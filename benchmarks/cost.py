"""What a video costs, by GPU kind: of a deployment's finished jobs, or of times measured elsewhere.

    reel bench cost --price H200=3.50 --price H100=2.50          # of this deployment's finished jobs
    reel bench cost --price H200=3.50 --video "H200 8 52.1"      # 8 GPUs for 52.1 s

Prices are yours: currency per GPU-hour, by a word of the device's name. Without a price only GPU-seconds are
printed. Jobs of nodes that have a price (REEL_NODE_PRICE_PER_HOUR) need none here.
"""

import argparse
import sys
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parent.parent))

from jobs.job import Job, JobState

PAGE = 500


@dataclass(frozen=True)
class Video:
    """One finished video. cost: what its own node's price made it; None: no price."""

    model: str
    shape: str  # size, frames, steps
    device: str
    gpus: int
    gpu_seconds: float
    cost: float | None = None


@dataclass(frozen=True)
class Line:
    """One line of the table: videos of one model and shape on one kind of GPU."""

    model: str
    shape: str
    device: str
    gpus: int
    videos: int
    seconds: float  # median, of all the GPUs together
    gpu_seconds: float  # median
    cost: float | None  # median


def measured(jobs: Iterable[Job]) -> list[Video]:
    """The finished jobs that say what they used."""
    found = []
    for job in jobs:
        result, request = job.result, job.request
        if result is None or result.gpu_seconds is None or not result.gpus:
            continue
        shape = f"{request.size}, {request.frame_num} frames, {request.sampling_steps} steps"
        found.append(Video(request.model, shape, result.device, result.gpus, result.gpu_seconds, result.cost))
    return found


def price_of(device: str, prices: dict[str, float]) -> float | None:
    """The price of a GPU-hour whose name is in the device's, the longest name first; None: no price."""
    names = sorted((name for name in prices if name.lower() in device.lower()), key=len)
    return prices[names[-1]] if names else None


def lines(videos: Iterable[Video], prices: dict[str, float]) -> list[Line]:
    """The table, by model, shape and cost."""
    groups: dict[tuple[str, str, str, int], list[Video]] = defaultdict(list)
    for video in videos:
        groups[video.model, video.shape, video.device, video.gpus].append(video)
    found = []
    for (model, shape, device, gpus), group in groups.items():
        used = median(video.gpu_seconds for video in group)
        price = price_of(device, prices)
        own = [video.cost for video in group if video.cost is not None]
        cost = used * price / 3600 if price is not None else median(own) if own else None
        found.append(Line(model, shape, device, gpus, len(group), used / gpus, used, cost))
    return sorted(found, key=lambda line: (line.model, line.shape, line.cost or 0.0, line.device))


def table(found: Iterable[Line]) -> str:
    """Markdown."""
    rows = [
        "| model | video | GPUs | videos | seconds | GPU-seconds | cost a video |",
        "|---|---|---|---|---|---|---|",
    ]
    for line in found:
        cost = "no price" if line.cost is None else f"{line.cost:.4f}"
        cells = (
            line.model, line.shape, f"{line.gpus} x {line.device}", str(line.videos), f"{line.seconds:.1f}",
            f"{line.gpu_seconds:.1f}", cost,
        )  # fmt: skip
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def parse_price(text: str) -> tuple[str, float]:
    """``H200=3.50``."""
    name, _, amount = text.partition("=")
    try:
        price = float(amount)
    except ValueError:
        price = -1.0
    if not name or price < 0:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected such as H200=3.50, per GPU-hour")
    return name, price


def parse_video(text: str) -> Video:
    """``H200 8 52.1``: device, GPUs, seconds."""
    try:
        *device, gpus, seconds = text.split()
        return Video("given", "as measured", " ".join(device), int(gpus), int(gpus) * float(seconds))
    except ValueError:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected such as 'H200 8 52.1'") from None


def finished() -> Iterable[Job]:
    """All finished jobs of the deployment that REEL_REDIS_URL or the local stack names."""
    from infra.stack_env import use_stack

    use_stack(None, "REEL_REDIS_URL")
    from jobs.client import connect
    from jobs.settings import get_settings
    from jobs.store import JobStore

    settings = get_settings()
    store, cursor, first = JobStore(connect(settings), settings), None, True
    while first or cursor:
        page, cursor = store.list("*", state=JobState.SUCCEEDED, limit=PAGE, cursor=cursor)
        first = False
        yield from page


def main() -> None:
    """The program."""
    parser = argparse.ArgumentParser(
        prog="reel bench cost", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--price", type=parse_price, action="append", default=[], metavar="GPU=PRICE")
    parser.add_argument(
        "--video", type=parse_video, action="append", default=[], metavar="'GPU COUNT SECONDS'"
    )
    args = parser.parse_args()
    videos = args.video or measured(finished())
    if not videos:
        sys.exit(
            "no finished job says what it used yet; give --video 'GPU COUNT SECONDS' for times of your own"
        )
    print(table(lines(videos, dict(args.price))))


if __name__ == "__main__":
    main()
