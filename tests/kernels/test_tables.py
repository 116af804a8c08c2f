"""Tuning tables: shipped ones are well formed; an unknown GPU warns once and works."""

import json
import warnings
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch

from kernels import tables


def test_unknown_gpu_warns_once(tmp_path: Path):
    with pytest.warns(RuntimeWarning, match=r"no tuning table Some_GPU_9000\.json for 'Some GPU 9000'"):
        assert tables.load("Some GPU 9000", tmp_path) == {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tables.load("Some GPU 9000", tmp_path) == {}


def test_a_card_of_the_same_chip_lends_its_table(tmp_path: Path):
    """And says so; a table of its own comes first."""
    lent, own = {"op": {"8": {"warps": 2}}}, {"op": {"8": {"warps": 4}}}
    (tmp_path / "NVIDIA_H200.json").write_text(json.dumps({"device": "NVIDIA H200", "ops": lent}))
    with pytest.warns(RuntimeWarning, match="the settings of 'NVIDIA H200', which has the same chip"):
        assert tables.load("NVIDIA H100 80GB HBM3", tmp_path) == lent
    assert tables.own("NVIDIA H100 80GB HBM3", tmp_path) is None
    path = tmp_path / "NVIDIA_H100_80GB_HBM3.json"
    path.write_text(json.dumps({"device": "NVIDIA H100 80GB HBM3", "ops": own}))
    tables.load.cache_clear()
    assert tables.load("NVIDIA H100 80GB HBM3", tmp_path) == own
    for sibling in tables.SIBLINGS.values():
        assert tables.own(sibling), f"{sibling} is to lend a table and has none"


def test_a_table_is_read(tmp_path: Path):
    (tmp_path / "Toy.json").write_text(json.dumps({"device": "Toy", "ops": {"op": {"8": {"warps": 2}}}}))
    assert tables.load("Toy", tmp_path) == {"op": {"8": {"warps": 2}}}


def test_a_setting_is_the_default_under_what_was_measured_on_that_very_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of two cards in one machine each has its own; other operations, keys and devices the default."""
    names = ["Toy", "Other"]
    measured = {"Toy": {"op": {"bias 8": {"warps": 2}}}, "Other": {"op": {"gelu 8": {"warps": 16}}}}
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: names[getattr(device, "index", device)])
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(tables, "load", lambda name: measured[name])
    tables._setting.cache_clear()
    default = {"warps": 8, "rows": 1}
    try:

        def warps(op: str, key: str, device: str) -> int:
            found = tables.setting(op, key, torch.device(device), default)
            assert found == {"warps": found["warps"], "rows": 1}
            return int(found["warps"])

        assert [warps("op", "bias 8", device) for device in ("cuda:0", "cuda", "cuda:1")] == [2, 2, 8]
        assert [warps("op", "gelu 8", device) for device in ("cuda:0", "cuda:1", "cpu")] == [8, 16, 8]
        assert [warps("op", "8", "cuda:0"), warps("po", "bias 8", "cuda:0")] == [8, 8]
        assert tables.entries("op", torch.device("cuda", 1)) == measured["Other"]["op"]
        assert tables.entries("op", torch.device("cpu")) == {}
    finally:
        tables._setting.cache_clear()
    assert default == {"warps": 8, "rows": 1}


def test_runs_side_by_side_lose_nothing_of_each_other(tmp_path: Path) -> None:
    """Four processes add an operation each to one table, and two its entries."""
    path = tmp_path / "deeper" / "X.json"
    tables.update(path, "X", "long ago", {"gemm": {"a": {"ms": 1}, "b": {"ms": 2}}})
    with ProcessPoolExecutor(4, mp_context=get_context("spawn")) as pool:
        list(pool.map(partial(_measured, path), range(8)))
    found = json.loads(path.read_text())
    assert found["device"] == "X"
    assert found["measured"] == "today"
    assert found["ops"] == {"gemm": {"a": {"ms": 7}, "b": {"ms": 2}}} | {
        f"op{n}": {"k": {"ms": n}} for n in range(8)
    }
    assert [one.name for one in path.parent.iterdir()] == ["X.json"]


def _measured(path: Path, number: int) -> None:
    more = {"gemm": {"a": {"ms": 7}}} if number % 4 == 0 else {}
    tables.update(path, "X", "today", {f"op{number}": {"k": {"ms": number}}} | more)


def test_a_new_file_begins_with_the_shipped_table(tmp_path: Path) -> None:
    device = "NVIDIA H200"
    shipped = tables.own(device)
    assert shipped is not None
    tables.update(tmp_path / "new.json", device, "today", {"gemm": {"a": {"ms": 1}}})
    found = json.loads((tmp_path / "new.json").read_text())["ops"]
    assert found["gemm"].pop("a") == {"ms": 1}
    assert found == shipped


def test_shipped_tables_name_their_device_and_when():
    paths = list(tables.FOLDER.glob("*.json"))
    assert paths
    for path in paths:
        table = json.loads(path.read_text())
        assert tables.file_name(table["device"]) == path.name
        assert table["measured"]
        assert set(table["ops"]) <= {
            "norm_modulate", "qk_norm_rope", "rms_norm", "gemm", "attention", "vae_norm_silu", "vae_upsample",
            "wide_attention", "attention_8bit", "attention_8bit_backend", "vae_flat",
            "attention_8bit_hopper",
        }  # fmt: skip
        for entry in table["ops"].get("gemm", {}).values():
            assert entry["backend"] in ("library", "triton")


def test_importing_kernels_imports_no_triton():
    import subprocess
    import sys

    code = (
        "import sys, kernels, kernels.norm_modulate, kernels.qk_norm_rope, kernels.gemm, kernels.attention, "
        "kernels.vae_norm_silu, kernels.vae_upsample, "
        "kernels.wide_attention\n"
        "ours = [m for m in sys.modules if m.startswith('kernels.') and m.endswith('.triton')]\n"
        "assert not ours, ours"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
