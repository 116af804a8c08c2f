"""A first judgement of trained experts on a GPU, and a sheet of what they draw.

    python -m models.demo.train.report

The figures of record come from `benchmarks/quality.py`; these tell within seconds whether more training
is needed, and which guidance scale to ship (chosen on captions of training's kind, never on held-out ones).
"""

import json
import random

from models.demo.train import fast_vae
from models.demo.train.captions import describe, held_out_prompts
from models.demo.train.common import SEED, arguments
from models.demo.train.sample import Sampler, load_expert, strip_sheet
from models.demo.train.train_experts import GUIDE, SHIFT
from models.demo.train.world import sample_scenes


def main() -> None:
    """Judge what was saved; results.json grows as it goes."""
    parser = arguments(__doc__ or "", seconds=0)
    parser.add_argument("--count", type=int, default=512, help="held-out captions")
    parser.add_argument("--guides", type=float, nargs="*", default=[2.0, 4.5], help="other scales to compare")
    args = parser.parse_args()
    fast_vae.speed_up()
    results: dict[str, dict[str, float]] = {}

    def note(name: str, scores: dict[str, float]) -> None:
        results[name] = scores
        print(f"report: {name}:", scores, flush=True)
        (args.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")

    pairs = [(scene, caption.text) for scene, caption in held_out_prompts(args.count)]
    sampler = Sampler(args.out, args.device)
    high, low = (load_expert(args.out, name, args.device).eval() for name in ("high", "low"))
    clips, scores = sampler.run(high, low, pairs, shift=SHIFT, guide=(GUIDE, GUIDE))
    note(f"{len(pairs)} held-out captions, guide {GUIDE:g}", scores)
    count = min(32, len(pairs))
    strip_sheet(clips[:count], [text for _, text in pairs[:count]], args.out / "sheet.png")
    note("held-out drawn clips after the VAE", sampler.judge_drawn([scene for scene, _ in pairs]))
    rng = random.Random(SEED)
    known = [
        (scene, describe(scene, rng, complete=True).text)
        for scene in sample_scenes(min(256, args.count), SEED + 77)
    ]
    for guide in (GUIDE, *args.guides):
        _, scores = sampler.run(high, low, known, shift=SHIFT, guide=(guide, guide))
        note(f"{len(known)} captions of training's kind, guide {guide:g}", scores)


if __name__ == "__main__":
    main()
