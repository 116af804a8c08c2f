"""Builds the demo model's tokenizer: lower-cased byte-pair pieces of the world's captions.

    python -m models.demo.train.tokenizer

Words of the world become single tokens; any other word falls apart into letters.
"""

import json
import random
import string
from pathlib import Path

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from models.demo.train.captions import describe
from models.demo.train.common import MODEL_DIR, SEED, TEXT_LEN
from models.demo.train.world import sample_scenes

VOCABULARY = 640
PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"  # ids 0, 1, 2 as in UMT5


def build_tokenizer() -> Tokenizer:
    """Train the tokenizer on training captions; the same every time."""
    tokenizer = Tokenizer(models.BPE(unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Lowercase(), normalizers.Replace("’", "'")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Punctuation(), pre_tokenizers.Metaspace()]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, END, UNKNOWN],
        initial_alphabet=list(string.ascii_lowercase + string.digits + string.punctuation),
        show_progress=False,
    )
    rng = random.Random(SEED)
    captions = (describe(scene, rng).text for scene in sample_scenes(30_000, SEED))
    tokenizer.train_from_iterator(captions, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {END}", special_tokens=[(END, tokenizer.token_to_id(END))]
    )
    return tokenizer


def save_tokenizer(folder: Path) -> None:
    """Write the tokenizer as transformers loads it, where the official layout has it."""
    target = folder / "google" / "umt5-xxl"
    target.mkdir(parents=True, exist_ok=True)
    build_tokenizer().save(str(target / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": TEXT_LEN,
        "pad_token": PAD,
        "eos_token": END,
        "unk_token": UNKNOWN,
        "clean_up_tokenization_spaces": False,
    }
    (target / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
    save_tokenizer(MODEL_DIR)
