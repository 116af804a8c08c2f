"""UMT5's configuration, and its tensors' names in the official checkpoint and in transformers."""

import re

from transformers import UMT5Config

# Official name and transformers' name of each tensor; {} is the block's number.
NAMES = (
    ("token_embedding.weight", "shared.weight"),
    ("norm.weight", "encoder.final_layer_norm.weight"),
    ("blocks.{}.norm1.weight", "encoder.block.{}.layer.0.layer_norm.weight"),
    ("blocks.{}.norm2.weight", "encoder.block.{}.layer.1.layer_norm.weight"),
    *(
        (f"blocks.{{}}.attn.{x}.weight", f"encoder.block.{{}}.layer.0.SelfAttention.{x}.weight")
        for x in "qkvo"
    ),
    (
        "blocks.{}.pos_embedding.embedding.weight",
        "encoder.block.{}.layer.0.SelfAttention.relative_attention_bias.weight",
    ),
    ("blocks.{}.ffn.gate.0.weight", "encoder.block.{}.layer.1.DenseReluDense.wi_0.weight"),
    ("blocks.{}.ffn.fc1.weight", "encoder.block.{}.layer.1.DenseReluDense.wi_1.weight"),
    ("blocks.{}.ffn.fc2.weight", "encoder.block.{}.layer.1.DenseReluDense.wo.weight"),
)
TO_TRANSFORMERS = dict(NAMES)
TO_OFFICIAL = {theirs: official for official, theirs in NAMES}


def transformers_name(official: str) -> str:
    """The name in `UMT5EncoderModel` of an official UMT5 tensor; an unknown name comes back as it is."""
    return _rename(official, r"^blocks\.(\d+)\.", "blocks.{}.", TO_TRANSFORMERS)


def official_name(theirs: str) -> str:
    """The inverse of `transformers_name`."""
    return _rename(theirs, r"^encoder\.block\.(\d+)\.", "encoder.block.{}.", TO_OFFICIAL)


def _rename(name: str, pattern: str, generic: str, names: dict[str, str]) -> str:
    number = re.match(pattern, name)
    if number is None:
        return names.get(name, name)
    renamed = names.get(re.sub(pattern, generic, name, count=1))
    return name if renamed is None else renamed.format(number[1])


def umt5_config(
    vocab: int, dim: int, attention_dim: int, ffn_dim: int, heads: int, layers: int
) -> UMT5Config:
    """A UMT5 encoder's configuration; buckets of relative positions are always 32 up to 128 tokens."""
    return UMT5Config(
        vocab_size=vocab,
        d_model=dim,
        d_kv=attention_dim // heads,
        d_ff=ffn_dim,
        num_heads=heads,
        num_layers=layers,
        relative_attention_num_buckets=32,
        relative_attention_max_distance=128,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        layer_norm_epsilon=1e-6,
        use_cache=False,
    )


def config_from_shapes(shapes: dict[str, tuple[int, ...]]) -> UMT5Config:
    """The configuration that official UMT5 tensors of these shapes belong to. KeyError if one is missing."""
    vocab, dim = shapes["token_embedding.weight"]
    heads = shapes["blocks.0.pos_embedding.embedding.weight"][1]
    layers = 1 + max(int(name.split(".")[1]) for name in shapes if name.startswith("blocks."))
    attention_dim = shapes["blocks.0.attn.q.weight"][0]
    return umt5_config(vocab, dim, attention_dim, shapes["blocks.0.ffn.fc1.weight"][0], heads, layers)
