"""Trains the demo model's text encoder on what captions say; it is frozen afterwards.

    python -m models.demo.train.train_text

Every token's embedding must tell, by one linear layer, the colour, shape, motion ... of both things and
of the scene (label 0 where the caption leaves it unsaid). So binding words to things is settled here,
and each of the diffusion transformer's cross-attentions finds the whole scene in any token.
"""

import random
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import UMT5EncoderModel

from engine.umt5 import transformers_name, umt5_config
from models.demo.train.captions import SLOTS, describe, held_out_prompts
from models.demo.train.common import (
    SEED,
    TEXT_DIM,
    TEXT_LEN,
    Budget,
    Log,
    arguments,
    prepare,
    replace_file,
    spread,
)
from models.demo.train.tokenizer import save_tokenizer
from models.demo.train.world import sample_scenes

CHECKPOINT = "models_t5_umt5-xxl-enc-bf16.pth"
LAYERS, HEADS, FFN_DIM = 3, 4, 512
# Words that people add and the world doesn't know: the encoder learns to pass over them.
FILLERS = (
    "beautiful",
    "cinematic",
    "realistic",
    "4k",
    "high quality",
    "lovely",
    "very",
    "bright",
    "cute",
    "nice",
    "detailed",
    "please",
    "slow motion",
    "wide shot",
    "simple",
    "style",
    "scene",
    "frame",
)


def make_encoder(tokenizer_size: int) -> UMT5EncoderModel:
    """The architecture: UMT5 with 3 layers of 192."""
    return UMT5EncoderModel(umt5_config(tokenizer_size, TEXT_DIM, TEXT_DIM, FFN_DIM, HEADS, LAYERS))


def official_state(encoder: nn.Module) -> dict[str, Tensor]:
    """The encoder's weights by the official checkpoint's names, bf16."""
    state = encoder.state_dict()
    names = ["token_embedding.weight", "norm.weight"]
    for i in range(LAYERS):
        names += [f"blocks.{i}.attn.{part}.weight" for part in "qkvo"]
        names += [
            f"blocks.{i}.{part}.weight"
            for part in ("norm1", "norm2", "pos_embedding.embedding", "ffn.gate.0", "ffn.fc1", "ffn.fc2")
        ]
    return {name: state[transformers_name(name)].detach().to("cpu", torch.bfloat16) for name in names}


def load_tokens(folder: Path) -> Tokenizer:
    """The saved tokenizer, without transformers' wrapping."""
    tokenizer: Tokenizer = Tokenizer.from_file(str(folder / "google" / "umt5-xxl" / "tokenizer.json"))
    tokenizer.enable_padding(length=TEXT_LEN)
    tokenizer.enable_truncation(TEXT_LEN)
    return tokenizer


def load_encoder(folder: Path, device: str) -> tuple[UMT5EncoderModel, Tokenizer]:
    """The saved encoder in fp32 and its tokenizer."""
    tokenizer = load_tokens(folder)
    encoder = make_encoder(tokenizer.get_vocab_size())
    saved = torch.load(folder / CHECKPOINT, weights_only=True)
    state = {transformers_name(name): tensor.float() for name, tensor in saved.items()}
    missing, unexpected = encoder.load_state_dict(state, strict=False)
    assert not unexpected, f"unknown tensors {unexpected}"
    assert all("embed_tokens" in name for name in missing), f"missing tensors {missing}"
    return encoder.to(device).eval(), tokenizer


def tokenize(tokenizer: Tokenizer, texts: list[str]) -> Tensor:
    """Ids [N, TEXT_LEN], padded on the right with 0 (the id of nothing else)."""
    return torch.tensor([encoding.ids for encoding in tokenizer.encode_batch(texts)])


@torch.no_grad()
def embed(encoder: nn.Module, ids: Tensor, chunk: int = 4096) -> Tensor:
    """Embeddings [N, TEXT_LEN, TEXT_DIM] as the engine gives them: zeros past the end; bf16 to save room."""
    parts = []
    for rows in ids.split(chunk):
        keep = (rows != 0).long()
        hidden = encoder(input_ids=rows, attention_mask=keep).last_hidden_state
        parts.append((hidden * keep[..., None]).bfloat16())
    return torch.cat(parts)


def _distract(text: str, rng: random.Random) -> str:
    """Now and then put words from outside the world into a caption."""
    if rng.random() < 0.85:
        return text
    words = text.split()
    for _ in range(rng.randint(1, 3)):
        filler = rng.choice(FILLERS)
        if rng.random() < 0.3:
            filler = "".join(rng.choices("abcdefghijklmnoprstuvwy", k=rng.randint(3, 8)))
        words.insert(rng.randint(0, len(words)), filler)
    return " ".join(words)


def caption_pool(job: tuple[Path, int, int]) -> tuple[Tensor, Tensor]:
    """(ids [N, TEXT_LEN], labels [N, slots]) of training captions; one in fifty is the empty prompt."""
    folder, count, seed = job
    rng = random.Random(f"text-{seed}")
    texts, labels = [], []
    for scene in sample_scenes(count, seed):
        caption = describe(scene, rng)
        empty = rng.random() < 0.02
        texts.append("" if empty else _distract(caption.text, rng))
        labels.append([0] * len(SLOTS) if empty else list(caption.labels.values()))
    return tokenize(load_tokens(folder), texts), torch.tensor(labels)


def slot_losses(logits: Tensor, labels: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """(mean cross-entropy over real tokens and slots, share of tokens' slots that are right)."""
    loss, right = logits.new_zeros(()), logits.new_zeros(())
    for part, column in zip(logits.split(list(SLOTS.values()), dim=-1), labels.unbind(1), strict=True):
        target = column[:, None].expand(-1, part.shape[1])
        loss = loss + (F.cross_entropy(part.transpose(1, 2).float(), target, reduction="none") * mask).sum()
        right = right + ((part.argmax(-1) == target) * mask).sum()
    total = mask.sum() * len(SLOTS)
    return loss / total, right / total


def held_out_accuracy(encoder: nn.Module, reader: nn.Module, tokenizer: Tokenizer, device: str) -> float:
    """Share of held-out captions of which every slot is read right from the mean over tokens."""
    pairs = held_out_prompts(1024)
    ids = tokenize(tokenizer, [caption.text for _, caption in pairs]).to(device)
    mask = (ids != 0).long()
    labels = torch.tensor([list(caption.labels.values()) for _, caption in pairs])
    with torch.no_grad():
        hidden = encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        logits = reader(hidden) * mask[..., None]
    parts = logits.sum(1).split(list(SLOTS.values()), dim=-1)
    read = torch.stack([part.argmax(-1) for part in parts], dim=1).cpu()
    return float((read == labels).all(1).float().mean())


def main() -> None:
    """Train, measure, save."""
    args = arguments(__doc__ or "", seconds=40).parse_args()
    if not (args.out / "google").exists():
        save_tokenizer(args.out)
    tiny = args.max_steps < 1000
    jobs = [(args.out, 100 if tiny else 5_000, SEED + i) for i in range(16)]
    pools = spread(caption_pool, jobs)
    ids, labels = (torch.cat(column).to(args.device) for column in zip(*pools, strict=True))
    ids = ids[:, : int((ids != 0).sum(1).max())]  # what is padding in every caption costs and gives nothing
    prepare(args.device)
    if args.resume:
        encoder, tokenizer = load_encoder(args.out, args.device)
    else:
        tokenizer = load_tokens(args.out)
        encoder = make_encoder(tokenizer.get_vocab_size()).to(args.device)
    encoder.train()
    reader = nn.Linear(TEXT_DIM, sum(SLOTS.values())).to(args.device)
    optimizer = torch.optim.AdamW(
        [*encoder.parameters(), *reader.parameters()],
        lr=1e-3,
        weight_decay=0.01,
        betas=(0.9, 0.98),
        fused=args.device == "cuda",
    )
    budget = Budget(optimizer, args.lr or 1.5e-3, args.seconds, args.max_steps, until=args.until)
    log = Log("text", args.out, every=min(100, args.max_steps), resume=args.resume)
    for step in budget.steps():
        rows = torch.randint(len(ids), (args.batch or 512,), device=args.device)
        mask = (ids[rows] != 0).long()
        with torch.autocast(args.device, torch.bfloat16, enabled=args.device == "cuda"):
            hidden = encoder(input_ids=ids[rows], attention_mask=mask).last_hidden_state
            logits = reader(hidden)
        loss, right = slot_losses(logits, labels[rows], mask)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(encoder.parameters(), 1.0)
        optimizer.step()
        log.add(step, loss=loss, token_accuracy=right)
    log.flush(step)
    encoder.eval()
    accuracy = held_out_accuracy(encoder, reader, tokenizer, args.device)
    print(f"text: all slots right for {accuracy:.1%} of held-out captions", flush=True)
    replace_file(args.out / CHECKPOINT, lambda draft: torch.save(official_state(encoder), draft))
    log.save(held_out_captions_all_slots_right=accuracy)


if __name__ == "__main__":
    main()
