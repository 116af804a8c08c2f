"""The transports' GPU side: the driver's calls on one GPU, and layouts on two against one."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from engine.parallel import cuda_driver
from engine.parallel.watch import BEAT, LOOK_SECONDS, Watch
from kernels import gemm
from tests.kernels.check import relative_error


def test_copies_of_rows():
    """Contiguous, and a slice of heads each way; what lies between the rows stays."""
    stream = torch.cuda.current_stream().cuda_stream
    source = torch.randn(1000, 640, device="cuda").bfloat16()
    into = torch.zeros(1000, 5120, device="cuda", dtype=torch.bfloat16)
    cuda_driver.copy_rows(into[:, 640:1280], source, stream)
    assert torch.equal(into[:, 640:1280], source)
    assert not into[:, :640].any()
    assert not into[:, 1280:].any()
    back = torch.zeros_like(source)
    cuda_driver.copy_rows(back, into[:, 640:1280], stream)
    assert torch.equal(back, source)
    again = torch.zeros_like(source)
    cuda_driver.copy_rows(again, source, stream)
    assert torch.equal(again, source)


def test_a_stream_waits_for_a_word_that_another_sets():
    word = torch.zeros(1, dtype=torch.int32, device="cuda")
    first, second = torch.cuda.Stream(), torch.cuda.Stream()
    done, result = torch.cuda.Event(), torch.zeros(1, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(first):
        cuda_driver.wait_word(word.data_ptr(), 3, first.cuda_stream)
        result += 1
        done.record()
    cuda_driver.write_word(word.data_ptr(), 2, second.cuda_stream)
    second.synchronize()
    assert not done.query()
    cuda_driver.write_word(word.data_ptr(), 4, second.cuda_stream)
    first.synchronize()
    assert result.item() == 1


def test_a_gpu_that_waits_has_no_pulse(tmp_path: Path):
    """The watch beats when the stream gets to a mark, not when the host has queued it."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    word, stream = torch.zeros(1, dtype=torch.int32, device="cuda"), torch.cuda.Stream()
    torch.cuda.synchronize()
    control = dist.group.WORLD
    assert control is not None
    watch = Watch(control, 30.0, torch.device("cuda", torch.cuda.current_device()))
    try:
        began = float(watch._board[0, BEAT])
        with torch.cuda.stream(stream):
            cuda_driver.wait_word(word.data_ptr(), 1, stream.cuda_stream)
            watch.pulse()
        time.sleep(4 * LOOK_SECONDS)
        assert float(watch._board[0, BEAT]) == began
        cuda_driver.write_word(word.data_ptr(), 1, torch.cuda.current_stream().cuda_stream)
        stream.synchronize()
        time.sleep(4 * LOOK_SECONDS)
        assert float(watch._board[0, BEAT]) > began
    finally:
        watch.close()
        dist.destroy_process_group()


@pytest.mark.parametrize("groups", [2, 3])
def test_a_product_in_parts_is_added_up_in_fp32(groups: int):
    x, weight = (
        torch.randn(300, 768, device="cuda").bfloat16(),
        torch.randn(512, 768, device="cuda").bfloat16(),
    )
    total = None
    for x_part, weight_part in zip(x.chunk(groups, 1), weight.chunk(groups, 1), strict=True):
        total = gemm.add_product(total, x_part, weight_part)
    assert total is not None
    assert total.dtype == torch.float32
    assert relative_error(total, x.double() @ weight.double().t()) < 1e-5


@pytest.mark.timeout(600)
def test_layouts_on_two_gpus_give_what_one_gives(tmp_path: Path):
    """Every transport and overlap of the benchmark, which refuses to go on when a result is wrong."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA GPUs")
    figures = tmp_path / "figures.json"
    command = [sys.executable, "-m", "benchmarks.parallel", "--gpus", "2", "--blocks", "2", "--check-only"]
    subprocess.run([*command, "--json", str(figures)], check=True, timeout=500)
    checks = json.loads(figures.read_text())["checks"]
    assert any("1x2, push" in line for line in checks)
    assert any("1x2, collective" in line for line in checks)
