"""Prompts to embeddings: the UMT5 encoder of transformers with the official checkpoint's weights.

A prompt runs at its own length, not padded to 512: padding is masked in every layer, so the embeddings of
real tokens are the same (but for the order of sums), at a fraction of the work. What follows the prompt's
end is zeros, as the official pipeline has it.

Shapes: T text tokens, E embedding width.
"""

import html
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ftfy
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, UMT5Config, UMT5EncoderModel

from engine.parallel.mesh import Mesh
from engine.parallel.text import broadcast_texts


def clean_prompt(prompt: str) -> str:
    """The official cleaning: mend mojibake, undo HTML escapes twice, collapse whitespace."""
    text = html.unescape(html.unescape(ftfy.fix_text(prompt)))
    return re.sub(r"\s+", " ", text).strip()


class TextEncoder(nn.Module):
    """UMT5 encoder and tokenizer."""

    def __init__(self, config: UMT5Config, tokenizer: Any, text_len: int = 512) -> None:
        super().__init__()
        self.umt5 = UMT5EncoderModel(config)
        self.tokenizer = tokenizer
        self.text_len = text_len

    def encode_all(self, prompts: Sequence[str], mesh: Mesh) -> list[Tensor]:
        """[T, E] of each prompt on every rank, each encoded by one of them; a collective call."""
        if mesh.control is None:
            return [self.encode(prompt) for prompt in prompts]
        weight = self.umt5.shared.weight
        shape = (self.text_len, weight.shape[1])
        return broadcast_texts(lambda i: self.encode(prompts[i]), len(prompts), shape, weight)

    @torch.no_grad()
    def encode(self, prompt: str, beat: Callable[[], None] | None = None) -> Tensor:
        """[T, E] embeddings of one prompt, T = text_len: real tokens (cut at T), then zeros.

        `beat` is called after each layer, which on a CPU may take seconds.
        """
        if beat is not None:
            with _after_each(self.umt5.encoder.block, beat):
                return self.encode(prompt)
        ids = self.tokenize(prompt)
        device = self.umt5.shared.weight.device
        ids_1T = torch.tensor([ids], device=device)
        hidden_1TE = self.umt5(input_ids=ids_1T, attention_mask=torch.ones_like(ids_1T)).last_hidden_state
        return nn.functional.pad(hidden_1TE[0], (0, 0, 0, self.text_len - len(ids)))

    def tokenize(self, prompt: str) -> list[int]:
        """Token ids of the cleaned prompt with the end mark, at most text_len of them."""
        ids = self.tokenizer(clean_prompt(prompt), truncation=True, max_length=self.text_len)["input_ids"]
        return [int(i) for i in ids]


@contextmanager
def _after_each(layers: Iterable[nn.Module], beat: Callable[[], None]) -> Iterator[None]:
    hooks = [layer.register_forward_hook(lambda *_: beat()) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer saved in a checkpoint's folder (official: google/umt5-xxl), never from the network."""
    return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
