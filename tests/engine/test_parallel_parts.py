"""The parts of the parallel engine that need no second rank."""

import ctypes
import threading
import time

import numpy as np
import pytest
import torch
import torch.distributed as dist

from engine.errors import RankLost
from engine.frame_writer import FrameWriter
from engine.parallel import cuda_driver, mesh, transport
from engine.parallel.collective import CollectiveTransport
from engine.parallel.exchange import Traffic
from engine.parallel.mesh import Mesh
from engine.parallel.push import PushTransport, Route
from engine.parallel.shared import SharedWindow
from engine.vae_blocks import WholeFrame
from kernels.qk_norm_rope import SendLayout


class Slow:
    """A sink that takes its time, and fails when told."""

    def __init__(self, fail_at: int = -1) -> None:
        self.got: list[int] = []
        self.fail_at, self.sent = fail_at, 0
        self.threads: set[str] = set()

    def write(self, frames: np.ndarray) -> None:
        time.sleep(0.01)
        self.threads.add(threading.current_thread().name)
        if len(self.got) == self.fail_at:
            raise OSError("the disk is full")
        self.got.append(int(frames[0, 0, 0, 0]))


def frame(number: int) -> torch.Tensor:
    return torch.full((1, 2, 2, 3), number, dtype=torch.uint8)


def write_slowly(sink: Slow, count: int, pause: float = 0.005, end: BaseException | None = None) -> None:
    with FrameWriter(sink) as writer:
        for number in range(count):
            writer.write(frame(number))
            sink.sent += 1
            time.sleep(pause)
        if end is not None:
            raise end


def test_frames_are_written_in_order_by_another_thread() -> None:
    sink, beats = Slow(), list[int]()
    with FrameWriter(sink, lambda: beats.append(1)) as writer:
        begin = time.monotonic()
        for number in range(20):
            writer.write(frame(number))
        queued = time.monotonic() - begin
    assert sink.got == list(range(20))
    assert sink.threads == {"frames"}
    assert queued < 0.1  # 20 writes of 10 ms each
    assert beats


def test_a_sinks_error_ends_the_video() -> None:
    sink = Slow(fail_at=2)
    with pytest.raises(OSError, match="disk is full"):
        write_slowly(sink, 200)
    assert sink.got == [0, 1]
    assert sink.sent < 200  # it is heard while frames still come


def test_a_sinks_error_at_the_last_frame_is_heard_at_the_end() -> None:
    with pytest.raises(OSError, match="disk is full"):
        write_slowly(Slow(fail_at=0), 1, pause=0)


def test_a_canceled_video_drops_what_is_queued() -> None:
    sink = Slow()
    with pytest.raises(KeyboardInterrupt):
        write_slowly(sink, 100, pause=0, end=KeyboardInterrupt())
    assert len(sink.got) < 10


def test_a_transport_that_fails_its_trial_is_passed_over(
    world_of_one: dist.ProcessGroup, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The best one here loses data: the next is taken, and the log says why. Asked for, it is an error."""
    device = torch.device("cpu")
    monkeypatch.setattr(SharedWindow, "copy", lambda self, into, source: None)
    with pytest.raises(RuntimeError, match="doesn't work here: what was sent arrived changed"):
        transport.choose_transport("shared", world_of_one, world_of_one, device)
    monkeypatch.setattr(transport, "best", lambda device: "shared")
    with caplog.at_level("INFO"):
        chosen = transport.choose_transport("auto", world_of_one, world_of_one, device)
    assert isinstance(chosen, CollectiveTransport)
    assert "passed over: what was sent arrived changed" in caplog.text
    assert "attention's transport over 1 ranks: gloo all-to-all" in caplog.text


def test_a_transport_that_works_is_named_in_the_log(
    world_of_one: dist.ProcessGroup, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        transport.choose_transport("shared", world_of_one, world_of_one, torch.device("cpu"))
    assert "attention's transport over 1 ranks: shared memory of one host" in caplog.text
    with pytest.raises(ValueError, match="no transport is called 'pigeon'"):
        transport.choose_transport("pigeon", world_of_one, world_of_one, torch.device("cpu"))


def test_a_transport_that_loses_the_output_alone_fails_its_trial(
    world_of_one: dist.ProcessGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy, copies = SharedWindow.copy, list[int]()

    def lose(self: SharedWindow, into: torch.Tensor, source: torch.Tensor) -> None:
        copies.append(1)
        if len(copies) <= 4:  # v and q, in two groups of heads each
            copy(self, into, source)

    monkeypatch.setattr(SharedWindow, "copy", lose)
    with pytest.raises(RuntimeError, match="doesn't work here: the output came back changed"):
        transport.choose_transport("shared", world_of_one, world_of_one, torch.device("cpu"))


class Diary(SharedWindow):
    """A window that writes down what it is asked for."""

    asked: list[str]

    def fence(self) -> None:
        self.asked.append("fence")

    def copy(self, into_NM: torch.Tensor, source_NM: torch.Tensor) -> None:
        self.asked.append("copy")
        super().copy(into_NM, source_NM)

    def signal(self, rank: int, counter: int, value: int) -> None:
        self.asked.append("signal")
        super().signal(rank, counter, value)


@pytest.mark.parametrize("packed", [False, True])
def test_a_push_tells_of_a_piece_after_all_of_it_was_sent(
    world_of_one: dist.ProcessGroup, packed: bool
) -> None:
    """Copies wait for what is computed, and a reader's counter for the copies of both batch entries."""
    window = Diary(world_of_one, 1.0)
    window.asked = []
    carrier = PushTransport(window, Route.straight(0, 1), "")
    layout = SendLayout.of(3, 1, 2)
    x = torch.randn(2, 5, 3, 4)
    exchange = carrier.exchange(Traffic(2, 5, layout, 4, x.dtype, x.device), 1)
    exchange.send("q", layout.pack(x) if packed else x, packed)
    assert window.asked == ["fence", *["copy", "copy", "signal"] * 2]
    window.asked = []
    exchange.send_back(1, exchange.receive("q", 1))
    assert window.asked == ["fence", "copy", "copy", "signal"]
    assert torch.equal(exchange.receive_back(1), x[:, :, 2:].flatten(2))


def test_a_silent_rank_is_lost_after_the_limit(world_of_one: dist.ProcessGroup) -> None:
    window = SharedWindow(world_of_one, 0.05)
    window.reserve(64, 2)
    window.signal(0, 1, 3)
    window.wait(1, 3)
    with pytest.raises(RankLost, match=r"sent nothing for 0 s \(counter 1\)"):
        window.wait(1, 4)


@pytest.mark.parametrize(
    ("rows", "columns", "shared"), [(3, 9, True), (9, 3, True), (8, 1, True), (7, 7, False)]
)
def test_frames_with_a_latent_for_each_rank_are_shared(
    world_of_one: dist.ProcessGroup, monkeypatch: pytest.MonkeyPatch, rows: int, columns: int, shared: bool
) -> None:
    monkeypatch.setattr(mesh, "StripedFrame", lambda group, rows, columns: (rows, columns))
    space = Mesh(0, 2, 4, control=world_of_one).space(rows, columns)
    assert space == (rows, columns) if shared else isinstance(space, WholeFrame)


class Recorder:
    """Stands for the driver: keeps what each call was given."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, list[object]]] = []

    def __getattr__(self, name: str) -> object:
        def call(*arguments: object) -> int:
            plain = []
            for argument in arguments:
                if isinstance(argument, cuda_driver._Copy2D):
                    plain.append({key: getattr(argument, key) for key, _ in argument._fields_})
                else:
                    plain.append(getattr(argument, "value", argument))
            self.calls.append((name, plain))
            return 0

        return call


def test_copies_describe_their_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slice of columns into a slice of columns, and one flat copy where both are contiguous."""
    driver = Recorder()
    monkeypatch.setattr(cuda_driver, "_driver", lambda: driver)
    monkeypatch.setattr(ctypes, "byref", lambda structure: structure)
    source, into = torch.zeros(5, 8, dtype=torch.bfloat16), torch.zeros(5, 40, dtype=torch.bfloat16)
    cuda_driver.copy_rows(into[:, 16:24], source, stream=7)
    cuda_driver.copy_rows(torch.zeros_like(source), source, stream=7)
    (name, (copy, stream)), (flat, (_, at, size, _)) = driver.calls
    assert (name, stream) == ("cuMemcpy2DAsync_v2", 7)
    assert copy["src_device"] == source.data_ptr()
    assert copy["dst_device"] == into.data_ptr() + 32
    assert (copy["src_pitch"], copy["dst_pitch"]) == (16, 80)
    assert (copy["width"], copy["height"]) == (16, 5)
    assert copy["src_type"] == copy["dst_type"] == cuda_driver.UNIFIED
    assert (flat, at, size) == ("cuMemcpyAsync", source.data_ptr(), 80)
    with pytest.raises(ValueError, match="5 rows of 16 bytes don't fit 5 of 80"):
        cuda_driver.copy_rows(into, source, stream=7)
    with pytest.raises(ValueError, match="contiguous rows"):
        cuda_driver.copy_rows(into.t(), source.t(), stream=7)


def test_the_drivers_structure_has_its_size() -> None:
    """CUDA_MEMCPY2D on 64 bits: 2 x (2 sizes, a kind with padding, 3 pointers, a pitch) and 2 sizes."""
    assert ctypes.sizeof(cuda_driver._Copy2D) == 128


def test_the_drivers_error_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing(Recorder):
        def __getattr__(self, name: str) -> object:
            return lambda *arguments: 801

    monkeypatch.setattr(cuda_driver, "_driver", Refusing)
    with pytest.raises(RuntimeError, match=r"cuStreamWriteValue32_v2 failed: unknown error \(801\)"):
        cuda_driver.write_word(16, 1, 0)


def test_symmetric_memory_is_the_best_on_gpus_and_collectives_on_cpus() -> None:
    assert transport.best(torch.device("cuda", 0)) == "symmetric"
    assert transport.best(torch.device("cpu")) == "collective"
