"""A timeline of one rank from torch's profiler: one line a stream, coloured by kind, as SVG."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import torch

from benchmarks._measure import kind_of

WIDTH, LINE, LEFT = 1400, 34, 150
COLOURS = {
    "attention": "#4c78a8",
    "products": "#f58518",
    "elementwise": "#54a24b",
    "copies": "#e45756",
    "collectives": "#b279a2",
    "other": "#9d9da1",
}
SHOWN = ("kernel", "gpu_memcpy", "gpu_memset")  # categories of a GPU's work; without one, the CPU's operators


def record(step: Callable[[], object], device: torch.device, folder: Path, name: str) -> Path:
    """Profile one step (after one that isn't recorded) and draw it; all ranks call, this one keeps."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities = [torch.profiler.ProfilerActivity.CUDA]
        torch.cuda.synchronize(device)
    with torch.profiler.profile(activities=activities) as trace:
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    trace.export_chrome_trace(str(path))
    document = json.loads(path.read_text())
    with gzip.open(path.with_suffix(".json.gz"), "wt") as file:
        json.dump(document, file)
    path.unlink()
    picture = folder / f"{name}.svg"
    picture.write_text(draw(document["traceEvents"], name))
    return picture


def kind(event: dict[str, Any]) -> str:
    """The colour's name for an event."""
    name = str(event["name"])
    if event.get("cat") in ("gpu_memcpy", "gpu_memset"):
        return "copies"
    if "nccl" in name.lower() or "c10d::" in name:
        return "collectives"
    return kind_of(name) if event.get("cat") in SHOWN else "other"


def lines(events: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Events with a length by stream, or by thread where there is no GPU."""
    whole = [event for event in events if event.get("ph") == "X" and event.get("dur", 0) > 0]
    on_gpu = [event for event in whole if event.get("cat") in SHOWN]
    found: dict[str, list[dict[str, Any]]] = {}
    for event in on_gpu or [event for event in whole if event.get("cat") == "cpu_op"]:
        where = event.get("args", {}).get("stream", event.get("tid")) if on_gpu else event.get("tid")
        found.setdefault(f"stream {where}" if on_gpu else f"thread {where}", []).append(event)
    return dict(sorted(found.items(), key=lambda item: -sum(event["dur"] for event in item[1])))


def draw(events: list[dict[str, Any]], title: str) -> str:
    """The picture. Times in traces are microseconds."""
    rows = lines(events)
    starts = [event["ts"] for row in rows.values() for event in row]
    ends = [event["ts"] + event["dur"] for row in rows.values() for event in row]
    begin, end = min(starts, default=0.0), max(ends, default=1.0)
    scale = WIDTH / max(end - begin, 1e-9)
    height = 70 + LINE * len(rows)
    items = [f'<text x="10" y="22" font-weight="bold">{escape(title)}: {(end - begin) / 1e3:.2f} ms</text>']
    for number, (name, row) in enumerate(rows.items()):
        y = 36 + LINE * number
        busy = sum(event["dur"] for event in row) / 1e3
        items.append(f'<text x="10" y="{y + 17}">{escape(name)}, {busy:.1f} ms</text>')
        for event in row:
            x, width = LEFT + (event["ts"] - begin) * scale, max(event["dur"] * scale, 0.3)
            words = f"{event['name'][:80]}: {event['dur'] / 1e3:.3f} ms"
            items.append(
                f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{LINE - 10}" '
                f'fill="{COLOURS[kind(event)]}"><title>{escape(words)}</title></rect>'
            )
    for number, (name, colour) in enumerate(COLOURS.items()):
        x = LEFT + 130 * number
        items.append(f'<rect x="{x}" y="{height - 24}" width="12" height="12" fill="{colour}"/>')
        items.append(f'<text x="{x + 17}" y="{height - 13}">{name}</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{LEFT + WIDTH + 20}" height="{height}" '
        'font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="#fff"/>\n'
        + "\n".join(items)
        + "\n</svg>\n"
    )
