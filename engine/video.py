"""MP4 and pictures through ffmpeg: frames are encoded while later ones are still being decoded."""

import re
import shutil
import subprocess
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import TracebackType

import ffmpeg
import numpy as np
from PIL import Image

from engine.errors import VideoError


@lru_cache(maxsize=1)
def ffmpeg_path() -> str:
    """The ffmpeg on the PATH, or the one that imageio-ffmpeg carries."""
    found = shutil.which("ffmpeg")
    if found:
        return found
    import imageio_ffmpeg

    return str(imageio_ffmpeg.get_ffmpeg_exe())


class Mp4Writer:
    """A FrameSink that writes H.264 in MP4 (yuv420p, playable before it is whole). Use it with `with`."""

    def __init__(self, path: Path, width: int, height: int, fps: float, *, crf: int = 17) -> None:
        self.path, self.width, self.height, self.fps = Path(path), width, height, fps
        self.frames = 0
        self.first_frame: np.ndarray | None = None  # [height, width, 3], for the poster
        pixels = ffmpeg.input("pipe:", format="rawvideo", pix_fmt="rgb24", s=f"{width}x{height}", r=fps)
        mp4 = pixels.output(
            str(path), vcodec="libx264", pix_fmt="yuv420p", crf=crf, movflags="+faststart", loglevel="error"
        )
        self._process: subprocess.Popen[bytes] = mp4.overwrite_output().run_async(
            cmd=ffmpeg_path(), pipe_stdin=True, pipe_stderr=True
        )

    def write(self, frames: np.ndarray) -> None:
        """Append [n, height, width, 3] uint8 RGB frames. Raises VideoError with ffmpeg's own words."""
        if frames.shape[1:] != (self.height, self.width, 3) or frames.dtype != np.uint8:
            raise ValueError(
                f"frames are {frames.shape} {frames.dtype}, "
                f"expected [n, {self.height}, {self.width}, 3] uint8"
            )
        if self.first_frame is None and len(frames):
            self.first_frame = frames[0].copy()
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(np.ascontiguousarray(frames).tobytes())
        except (BrokenPipeError, ValueError) as error:
            raise VideoError(f"ffmpeg stopped while writing {self.path}: {self._end()}") from error
        self.frames += len(frames)

    def close(self) -> None:
        """Finish the file. Raises VideoError if ffmpeg failed."""
        words = self._end()
        if self._process.returncode:
            raise VideoError(f"ffmpeg could not write {self.path} (exit {self._process.returncode}): {words}")

    def abort(self) -> None:
        """Stop at once and remove what was written."""
        self._process.kill()
        self._end()
        self.path.unlink(missing_ok=True)

    def _end(self) -> str:
        """Close the pipes, wait, and return what ffmpeg said."""
        if self._process.stdin is not None and self._process.stdin.closed:
            self._process.stdin = None
        if self._process.stderr is None or self._process.stderr.closed:
            self._process.wait()
            return ""
        return self._process.communicate()[1].decode(errors="replace").strip()

    def __enter__(self) -> "Mp4Writer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()


@dataclass(frozen=True)
class VideoInfo:
    """What a decoded video turned out to be."""

    frames: int
    width: int
    height: int
    fps: float


def decode_video(path: Path) -> tuple[VideoInfo, np.ndarray]:
    """Decode every frame: the facts, and [frames, height, width, 3] uint8 RGB. Raises VideoError."""
    done = subprocess.run([ffmpeg_path(), "-hide_banner", "-i", str(path)], capture_output=True, check=False)
    words = done.stderr.decode(errors="replace")
    stream = re.search(r"Video:.*?, (\d+)x(\d+)[ ,].*?([\d.]+) fps", words)
    if stream is None:
        raise VideoError(f"{path} holds no video that ffmpeg can read: {words.strip()}")
    width, height, fps = int(stream[1]), int(stream[2]), float(stream[3])
    try:
        raw, _ = (
            ffmpeg.input(str(path))
            .output("pipe:", format="rawvideo", pix_fmt="rgb24", fps_mode="passthrough", loglevel="error")
            .run(cmd=ffmpeg_path(), capture_stdout=True, capture_stderr=True)
        )
    except ffmpeg.Error as error:
        raise VideoError(f"{path} can't be decoded: {error.stderr.decode(errors='replace')}") from error
    frames = np.frombuffer(raw, dtype=np.uint8).reshape(-1, height, width, 3)
    return VideoInfo(len(frames), width, height, fps), frames


def save_poster(frame: np.ndarray, path: Path) -> None:
    """One frame [height, width, 3] uint8 as a picture; the suffix (.png, .jpg) decides the format."""
    Image.fromarray(frame).save(path, quality=90)
