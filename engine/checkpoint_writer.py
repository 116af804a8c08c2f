"""Writes checkpoints in the full official layout: the tiny ones of the tests, the trained demo model."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from engine.config import DiTConfig, Task
from engine.umt5 import official_name

SHARD_STEM = "diffusion_pytorch_model"
TEXT_FILE = "models_t5_umt5-xxl-enc-bf16.pth"


def write_checkpoint(
    folder: Path,
    *,
    dit: DiTConfig,
    task: Task,
    high: Mapping[str, Tensor],
    low: Mapping[str, Tensor] | None,
    vae: Mapping[str, Tensor],
    vae_kind: str,
    umt5: Mapping[str, Tensor],
    tokenizer: PreTrainedTokenizerFast,
    reel: Mapping[str, Any],
    shards: int = 2,
) -> None:
    """Write state dicts as an official checkpoint: two experts in folders, or one at the root.

    `umt5` is the state dict of transformers' UMT5EncoderModel, stored in bf16 under the official names.
    `reel` is the content of reel.json (fields of engine.specs.Facts).
    """
    folder.mkdir(parents=True, exist_ok=True)
    if low is None:
        write_expert(folder, dit, task, high, shards)
    else:
        write_expert(folder / "high_noise_model", dit, task, high, shards)
        write_expert(folder / "low_noise_model", dit, task, low, shards)
    torch.save(_plain(vae), folder / f"Wan{vae_kind}_VAE.pth")
    official = {official_name(name): tensor for name, tensor in umt5.items() if "embed_tokens" not in name}
    torch.save({name: t.to(torch.bfloat16) for name, t in _plain(official).items()}, folder / TEXT_FILE)
    tokenizer.save_pretrained(str(folder / "google" / "umt5-xxl"))
    _write_json(folder / "reel.json", dict(reel))


def write_expert(folder: Path, dit: DiTConfig, task: Task, state: Mapping[str, Tensor], shards: int) -> None:
    """One expert: config.json, fp32 safetensors shards and their index."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "_class_name": "WanModel",
        "dim": dit.dim,
        "eps": dit.eps,
        "ffn_dim": dit.ffn_dim,
        "freq_dim": dit.freq_dim,
        "in_dim": dit.in_channels,
        "model_type": task,
        "num_heads": dit.num_heads,
        "num_layers": dit.num_layers,
        "out_dim": dit.out_channels,
        "text_len": dit.text_len,
    }
    _write_json(folder / "config.json", config)
    names = sorted(state)
    weight_map, size = {}, 0
    for shard in range(shards):
        file = f"{SHARD_STEM}-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: state[name].detach().float().cpu().contiguous() for name in names[shard::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(0o644)  # safetensors makes it private
        weight_map.update(dict.fromkeys(part, file))
        size += sum(4 * tensor.numel() for tensor in part.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    _write_json(folder / f"{SHARD_STEM}.safetensors.index.json", index)


def build_tokenizer(corpus: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on the spot: it knows every text, and ends it with </s>.

    Ids 0, 1, 2 are <pad>, </s>, <unk>, as UMT5 has them. `vocab_size` must exceed 259 (bytes and specials).
    """
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "</s>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=512,
    )


def _plain(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in state.items()}


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
