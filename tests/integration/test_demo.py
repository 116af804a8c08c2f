"""`reel demo`, what `make demo` runs: to its end, and interrupted while its job runs; both at once."""

import os
import secrets
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from engine.tiny import make_tiny
from engine.video import decode_video
from tests.integration.stack import until
from tests.support.processes import marked

pytestmark = pytest.mark.timeout(300)


class Demo:
    """One started demo; what it says on standard error goes to a file."""

    def __init__(self, folder: Path, model: Path) -> None:
        folder.mkdir()
        self.folder, self.said = folder, folder / "stderr"
        self.mark = f"REEL_TEST_MARK={secrets.token_hex(8)}"
        name, value = self.mark.split("=")
        places = ["--data", str(folder / "data"), "--out", str(folder / "out"), "--model", str(model)]
        with self.said.open("w") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "infra.cli", "demo", *places],
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env={**os.environ, name: value},
                start_new_session=True,
            )

    def says(self, words: str) -> bool:
        return words in self.said.read_text()

    def leftovers(self) -> list[int]:
        return marked(self.mark, self.folder)


def test_a_demo_prints_a_playable_file_and_an_interrupted_one_leaves_nothing(tmp_path: Path) -> None:
    model = make_tiny(tmp_path / "tiny")
    whole, cut = Demo(tmp_path / "whole", model), Demo(tmp_path / "cut", model)
    try:
        assert until(lambda: cut.says(": job job_") or cut.process.poll() is not None, 200)
        cut.process.send_signal(signal.SIGINT)
        assert cut.process.wait(60) == 130, cut.said.read_text()
        assert cut.says("stopped")
        assert "Traceback" not in cut.said.read_text()
        assert cut.leftovers() == []

        printed = whole.process.communicate(timeout=200)[0]
        assert whole.process.returncode == 0, whole.said.read_text()
    finally:
        for demo in (whole, cut):
            demo.process.kill()  # its guard takes the rest along
            demo.process.communicate()
    (path,) = printed.splitlines()  # and no address in a store that was stopped
    assert Path(path).parent == tmp_path / "whole" / "out"
    info, frames = decode_video(Path(path))
    assert (info.frames, info.width, info.height) == (9, 64, 48)
    assert frames.std() > 1
    assert whole.says("signature verified")
    assert whole.leftovers() == []
