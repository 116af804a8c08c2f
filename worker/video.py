"""What rank 0 does with frames: the MP4 as they come, a poster from the first, the file's facts."""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from engine.video import Mp4Writer, save_poster

VIDEO, POSTER, FACTS = "video.mp4", "poster.jpg", "facts.json"


@dataclass(frozen=True)
class VideoFacts:
    """A finished video beside its files; facts.json is written last, so a folder that has one is whole."""

    job_id: str
    width: int
    height: int
    frames: int
    fps: float
    bytes: int
    sha256: str
    seconds: dict[str, float] = field(default_factory=dict)  # phase to wall seconds
    manifest: dict[str, object] = field(default_factory=dict)  # how it was made


class VideoFolder:
    """A FrameSink over one attempt's folder. `write` while generating, then `finish`, or `abort`."""

    def __init__(self, folder: Path, job_id: str, fps: float) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._job_id, self._fps = job_id, fps
        self._writer: Mp4Writer | None = (
            None  # the first frames tell the size: an image's may differ from the request's
        )

    def write(self, frames: np.ndarray) -> None:
        """Accept [n, height, width, 3] uint8 RGB frames."""
        if self._writer is None:
            height, width = frames.shape[1:3]
            self._writer = Mp4Writer(self.folder / VIDEO, width, height, self._fps)
            save_poster(frames[0], self.folder / POSTER)
        self._writer.write(frames)

    def finish(self, seconds: dict[str, float], manifest: dict[str, object]) -> VideoFacts:
        """Wait for ffmpeg, then put down the facts. Raises engine.errors.VideoError in ffmpeg's own words."""
        assert self._writer is not None, "a video without frames"
        writer = self._writer
        writer.close()
        path = self.folder / VIDEO
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        facts = VideoFacts(
            job_id=self._job_id,
            width=writer.width,
            height=writer.height,
            frames=writer.frames,
            fps=self._fps,
            bytes=path.stat().st_size,
            sha256=digest,
            seconds=seconds,
            manifest=manifest,
        )
        part = self.folder / (FACTS + ".part")
        part.write_text(json.dumps(asdict(facts)), encoding="utf-8")
        part.replace(self.folder / FACTS)
        return facts

    def abort(self) -> None:
        """End ffmpeg, whatever it thinks of the frames it got; the folder is the node's to remove."""
        if self._writer is not None:
            self._writer.abort()


def read_facts(folder: Path) -> VideoFacts | None:
    """The facts of a whole video in `folder`, or None when it is not there or was never finished."""
    try:
        return VideoFacts(**json.loads((folder / FACTS).read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, TypeError):
        return None
