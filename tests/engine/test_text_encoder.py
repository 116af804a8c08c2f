import pytest
import torch
from transformers import UMT5Config, UMT5EncoderModel

from engine.checkpoint_writer import build_tokenizer
from engine.text_encoder import TextEncoder, clean_prompt
from engine.tiny import CORPUS, randomize
from engine.umt5 import official_name, transformers_name, umt5_config
from tests.engine.oracle import relative, tensors_without_effect

LENGTH = 32


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    tokenizer = build_tokenizer(CORPUS, 384)
    encoder = TextEncoder(umt5_config(384, 32, 48, 64, 4, 2), tokenizer, LENGTH).eval()
    randomize(encoder, torch.Generator().manual_seed(0))
    return encoder


def test_embeddings_are_transformers_with_a_padded_prompt(encoder: TextEncoder) -> None:
    """The official way: pad to the full length, mask the padding, then cut it off and put zeros."""
    prompt = "a cat walks on the grass"
    oracle = UMT5EncoderModel(encoder.umt5.config).eval()
    oracle.load_state_dict(encoder.umt5.state_dict())
    batch = encoder.tokenizer(prompt, padding="max_length", max_length=LENGTH, return_tensors="pt")
    real = int(batch.attention_mask.sum())
    assert 3 < real < LENGTH
    with torch.no_grad():
        padded = oracle(input_ids=batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state[0]
    got = encoder.encode(prompt)
    assert got.shape == (LENGTH, 32)
    assert relative(got[:real], padded[:real]) < 1e-5
    assert not got[real:].any()


def test_every_tensor_counts(encoder: TextEncoder) -> None:
    assert tensors_without_effect(encoder.umt5, lambda: encoder.encode("a small boat on a calm sea")) == []


def test_the_configuration_is_that_of_the_published_model() -> None:
    """transformers' own defaults are those of google/umt5; here only the sizes and what isn't used differ."""
    ours = umt5_config(384, 32, 48, 64, 4, 2)
    theirs = UMT5Config(vocab_size=384, d_model=32, d_kv=12, d_ff=64, num_heads=4, num_layers=2)
    different = {name for name, value in theirs.to_dict().items() if ours.to_dict()[name] != value}
    assert different == {"dropout_rate", "use_cache"}


def test_long_prompts_are_cut_before_their_end_mark(encoder: TextEncoder) -> None:
    ids = encoder.tokenize("boat sea sun " * 50)
    assert len(ids) == LENGTH
    assert ids[-1] == encoder.tokenizer.eos_token_id
    assert encoder.encode("boat sea sun " * 50).shape == (LENGTH, 32)


def test_the_end_mark_is_the_last_token(encoder: TextEncoder) -> None:
    assert encoder.tokenize("a cat")[-1] == encoder.tokenizer.eos_token_id == 1


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("  a\tcat \n walks ", "a cat walks"),
        ("salt &amp;amp; pepper", "salt & pepper"),  # escaped twice
        ("itâ€™s here", "it's here"),  # mojibake, and ftfy's straight quotes
        ("一只猫　在走", "一只猫 在走"),
    ],
)
def test_prompts_are_cleaned_as_the_official_way(raw: str, clean: str) -> None:
    assert clean_prompt(raw) == clean


def test_names_go_both_ways(encoder: TextEncoder) -> None:
    theirs = [name for name, _ in encoder.umt5.named_parameters()]
    assert [transformers_name(official_name(name)) for name in theirs] == theirs
    assert official_name(theirs[0]) == "token_embedding.weight"
    assert transformers_name("no.such.tensor") == "no.such.tensor"
    assert transformers_name("blocks.3.no_such.weight") == "blocks.3.no_such.weight"


def test_a_long_encoding_gives_signs_of_life(encoder: TextEncoder) -> None:
    beats: list[None] = []
    embeddings = encoder.encode("a cat", lambda: beats.append(None))
    assert len(beats) == len(encoder.umt5.encoder.block)
    assert torch.equal(embeddings, encoder.encode("a cat"))
    assert len(beats) == len(encoder.umt5.encoder.block)  # no hook is left
