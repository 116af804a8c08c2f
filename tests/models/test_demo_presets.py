"""The demo model's calibrated presets: offered where 8 bits can be computed, refused elsewhere with why."""

import json

from engine.presets import CACHED, EIGHT_BIT, Machine, offers
from models.demo.train.common import MODEL_DIR


def test_hopper_serves_them_a_cpu_emulates_them_and_an_older_gpu_says_why_not() -> None:
    told = json.loads((MODEL_DIR / "reel.json").read_text())["presets"]
    assert set(told) == {EIGHT_BIT, CACHED}
    for capability, words in (((9, 0), ""), (None, ""), ((8, 0), "compute capability 9.0")):
        refused = {preset.name: preset.refused for preset in offers(told, Machine(capability))}
        for name in told:
            assert bool(refused[name]) == bool(words)
            assert words in refused[name]
