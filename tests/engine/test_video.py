from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from engine.errors import VideoError
from engine.video import Mp4Writer, decode_video, save_poster


def moving_bar(frames: int, height: int, width: int) -> np.ndarray:
    """A white bar that moves 4 pixels a frame over grey."""
    video = np.full((frames, height, width, 3), 90, np.uint8)
    for i in range(frames):
        video[i, :, 4 * i : 4 * i + 16] = 250
    return video


@pytest.mark.parametrize("fps", [8, 16, 24])
def test_what_is_written_is_what_is_read(tmp_path: Path, fps: int) -> None:
    video = moving_bar(9, 48, 80)
    with Mp4Writer(tmp_path / "v.mp4", 80, 48, fps) as writer:
        for chunk in (video[:1], video[1:5], video[5:]):
            writer.write(chunk)
    info, decoded = decode_video(tmp_path / "v.mp4")
    assert (info.frames, info.width, info.height, info.fps) == (9, 80, 48, fps)
    assert writer.frames == 9
    assert np.abs(decoded.astype(int) - video).mean() < 3
    data = (tmp_path / "v.mp4").read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")  # +faststart: playable before it is whole


def test_a_poster_is_the_first_frame(tmp_path: Path) -> None:
    video = moving_bar(2, 48, 80)
    with Mp4Writer(tmp_path / "v.mp4", 80, 48, 8) as writer:
        writer.write(video)
    assert writer.first_frame is not None
    for name in ("poster.png", "poster.jpg"):
        save_poster(writer.first_frame, tmp_path / name)
        with Image.open(tmp_path / name) as poster:
            assert np.abs(np.array(poster).astype(int) - video[0]).mean() < 3


def write_some(path: Path, width: int, then: Exception | None = None) -> None:
    """Four frames of the width into an 80 x 48 video, and maybe trouble."""
    with Mp4Writer(path, 80, 48, 8) as writer:
        writer.write(moving_bar(4, 48, width))
        if then is not None:
            raise then


def test_frames_of_another_size_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected \[n, 48, 80, 3\]"):
        write_some(tmp_path / "v.mp4", 64)
    assert list(tmp_path.iterdir()) == []


def test_frames_of_other_numbers_are_refused(tmp_path: Path) -> None:
    with Mp4Writer(tmp_path / "v.mp4", 80, 48, 8) as writer:
        with pytest.raises(ValueError, match=r"float32, expected .* uint8"):
            writer.write(moving_bar(1, 48, 80).astype(np.float32))
        writer.write(moving_bar(1, 48, 80))
    assert decode_video(tmp_path / "v.mp4")[0].frames == 1


def test_the_posters_frame_outlives_the_callers_buffer(tmp_path: Path) -> None:
    video = moving_bar(1, 48, 80)
    with Mp4Writer(tmp_path / "v.mp4", 80, 48, 8) as writer:
        writer.write(video)
        video[:] = 0
        assert writer.first_frame is not None
        assert np.array_equal(writer.first_frame, moving_bar(1, 48, 80)[0])
        writer.write(video)


def test_an_error_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="elsewhere"):
        write_some(tmp_path / "v.mp4", 80, RuntimeError("elsewhere"))
    assert list(tmp_path.iterdir()) == []


def test_ffmpegs_own_words_reach_the_caller(tmp_path: Path) -> None:
    with pytest.raises(VideoError, match="No such file or directory"):
        write_some(tmp_path / "no such folder" / "v.mp4", 80)


def test_what_is_no_video_is_refused(tmp_path: Path) -> None:
    (tmp_path / "v.mp4").write_bytes(b"not a video")
    with pytest.raises(VideoError, match="holds no video"):
        decode_video(tmp_path / "v.mp4")
