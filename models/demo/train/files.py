"""Which files the trained model consists of, and their flat names on the way from a training machine."""

from pathlib import Path

MODEL_DIR = Path(__file__).resolve().parents[1]  # models/demo
EXTRAS = "extras.tar.gz"  # reel.json, configs, tokenizer, loss curves, logs, results, a sheet

# By the part that trains them, in the order of need.
STAGE_FILES = {
    "vae": ("Wan2.1_VAE.pth",),
    "text": ("models_t5_umt5-xxl-enc-bf16.pth",),
    "classifier": ("classifier.safetensors",),
    "experts": tuple(f"{which}_noise_model/diffusion_pytorch_model.safetensors" for which in ("high", "low")),
}
FLAT = {
    name: f"{Path(name).parent.name}.safetensors" if "/" in name else name
    for names in STAGE_FILES.values()
    for name in names
}
