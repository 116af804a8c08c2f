"""Tensor names of the public diffusers layout, as the official ones that our modules carry.

There the block's norm2 and norm3 have swapped names (its norm2 is the affine one before cross-attention,
officially norm3), and the VAE's blocks are grouped by resolution. Facts: diffusers' conversion script and
model files (huggingface/diffusers, Apache-2.0).
"""

import re

Rules = tuple[tuple[str, str], ...]

DIT: Rules = (
    (r"^condition_embedder\.(time|text)_embedder\.linear_1\.", r"\1_embedding.0."),
    (r"^condition_embedder\.(time|text)_embedder\.linear_2\.", r"\1_embedding.2."),
    (r"^condition_embedder\.time_proj\.", "time_projection.1."),
    (r"^scale_shift_table$", "head.modulation"),
    (r"^proj_out\.", "head.head."),
    (r"^(blocks\.\d+)\.scale_shift_table$", r"\1.modulation"),
    (r"^(blocks\.\d+)\.attn1\.", r"\1.self_attn."),
    (r"^(blocks\.\d+)\.attn2\.", r"\1.cross_attn."),
    (r"_attn\.to_([qkv])\.", r"_attn.\1."),
    (r"_attn\.to_out\.0\.", "_attn.o."),
    (r"^(blocks\.\d+)\.norm2\.", r"\1.norm3."),
    (r"\.ffn\.net\.0\.proj\.", ".ffn.0."),
    (r"\.ffn\.net\.2\.", ".ffn.2."),
)

VAE_COMMON: Rules = (
    (r"^quant_conv\.", "conv1."),
    (r"^post_quant_conv\.", "conv2."),
    (r"coder\.conv_in\.", "coder.conv1."),
    (r"coder\.norm_out\.", "coder.head.0."),
    (r"coder\.conv_out\.", "coder.head.2."),
    (r"\.mid_block\.resnets\.0\.", ".middle.0."),
    (r"\.mid_block\.attentions\.0\.", ".middle.1."),
    (r"\.mid_block\.resnets\.1\.", ".middle.2."),
)
VAE_BLOCK: Rules = (
    (r"\.norm1\.", ".residual.0."),
    (r"(?<=\d)\.conv1\.", ".residual.2."),
    (r"\.norm2\.", ".residual.3."),
    (r"(?<=\d)\.conv2\.", ".residual.6."),
    (r"\.conv_shortcut\.", ".shortcut."),
)
VAE_22: Rules = (
    (r"\.down_blocks\.(\d+)\.resnets\.", r".downsamples.\1.downsamples."),
    (r"\.down_blocks\.(\d+)\.downsampler\.", r".downsamples.\1.downsamples.2."),
    (r"\.up_blocks\.(\d+)\.resnets\.", r".upsamples.\1.upsamples."),
    (r"\.up_blocks\.(\d+)\.upsampler\.", r".upsamples.\1.upsamples.3."),
)
UP_21 = re.compile(r"\.up_blocks\.(\d+)\.(resnets|upsamplers)\.(\d+)\.")
LAYERS_UP_21 = 4  # three residual blocks and an upsample a resolution, in one flat list


def dit_name(name: str) -> str:
    """The official name of a diffusers transformer tensor; an unknown name comes back as it is."""
    return _apply(DIT, name)


def vae21_name(name: str) -> str:
    """The official name of a diffusers Wan2.1 VAE tensor."""
    up = UP_21.search(name)
    if up is not None:
        index = LAYERS_UP_21 * int(up[1]) + (int(up[3]) if up[2] == "resnets" else LAYERS_UP_21 - 1)
        name = name.replace(up[0], f".upsamples.{index}.")
    return _apply((*VAE_COMMON, *VAE_BLOCK), name.replace(".down_blocks.", ".downsamples."))


def vae22_name(name: str) -> str:
    """The official name of a diffusers Wan2.2 VAE tensor."""
    return _apply((*VAE_COMMON, *VAE_22, *VAE_BLOCK), name)


def _apply(rules: Rules, name: str) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name
