"""Trains the whole demo model within one wall-clock budget, each part in a process of its own.

    PYTHONPATH=. python -m models.demo.train.run_all --out FOLDER --seconds 400

What is worth keeping is copied to --out as soon as it exists, flat and in files under 16 MiB; bring it
into the checkpoint by `python -m models.demo.train.install FOLDER`. `--resume` starts from the weights in
models/demo, `--keep vae text classifier` leaves those as they are, and `--rehearse` runs everything on a
CPU with a few steps each.

How the budget is spent (shares of --seconds, from one H100's figures; MAC = multiply and add):
- VAE 0-30 %, beside text and classifier. 0.18 MMAC a pixel forward, 3.2 M parameters: a batch of 24 crops
  of 9 x 64 x 64 is 0.9 Mpixel, 1 TFLOP with its backward. At 16 channels that is bound by memory: some
  30 KB a pixel, 27 GB a step, 10 ms at 2.7 TB/s, and 15-25 ms with cuDNN's small convolutions: about
  30 steps/s alone, 2000-3000 steps.
- Text 2-10 %: 1.3 MMAC a token, 512 x 45 tokens a step: 0.2 TFLOP, launch-bound at about 10 ms.
- Classifier 10-30 %: 0.18 GMAC a clip, batch 128: 0.14 TFLOP, about 10 ms with the damage laid on it.
- Latents 31-38 %: 39 GFLOP a clip forward, about 1 ms: 20,000 clips.
- Experts 38-91 %: 6.5 M parameters on 320 tokens a clip, 14 GFLOP a clip with the backward; batch 128 is
  1.8 TFLOP: about 15 ms compiled, 27 ms eager: some 7000 (4000) steps each.
- 91-100 %: 512 held-out captions (100 TFLOP of denoising, 5 s), a sheet, copies.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from models.demo.train.files import EXTRAS, FLAT, MODEL_DIR, STAGE_FILES

VAE_MODES = ("graph", "eager", "plain")
REHEARSAL = {
    "vae": ["--max-steps", "2", "--batch", "2"],
    "text": ["--max-steps", "3", "--batch", "16"],
    "classifier": ["--max-steps", "3", "--batch", "8"],
    "experts": [
        "--max-steps",
        "4",
        "--batch",
        "2",
        "--clips",
        "6",
        "--big-clips",
        "1",
        "--evaluate",
        "2",
        "--save-every",
        "1",
    ],
}


@dataclass
class Stage:
    """One part's process, its log, and how often it was started."""

    name: str
    log: Path
    process: subprocess.Popen[bytes] | None = None
    tries: int = 0
    printed: int = 0
    failed: bool = field(default=False)

    def start(self, flags: list[str]) -> None:
        """Run the part's module."""
        command = [sys.executable, "-m", f"models.demo.train.train_{self.name}", *flags]
        say(self.name, "starts: " + " ".join(command[2:]))
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        self.tries += 1

    def relay(self) -> None:
        """Print what came to the log since."""
        if not self.log.exists():
            return
        text = self.log.read_bytes()
        fresh = text[self.printed : text.rfind(b"\n") + 1]
        self.printed += len(fresh)
        for line in fresh.decode(errors="replace").splitlines():
            say(self.name, line[:300])

    def ended(self) -> int | None:
        """The exit status, once."""
        if self.process is None:
            return None
        code = self.process.poll()
        if code is not None:
            self.process = None
        return code


class Run:
    """The clock and the parts."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.begin = time.time()
        self.work: Path = args.work
        logs = self.work / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        args.out.mkdir(parents=True, exist_ok=True)
        self.stages = {name: Stage(name, logs / f"{name}.log") for name in STAGE_FILES}
        self.copied: dict[Path, float] = {}

    def at(self, share: float) -> float:
        """The epoch second at which this share of the budget is used."""
        return self.begin + share * float(self.args.seconds)

    def bring_in(self) -> None:
        """Tokenizer, and with --resume or --keep the weights of before."""
        shutil.copytree(MODEL_DIR / "google", self.work / "google", dirs_exist_ok=True)
        for stage, files in STAGE_FILES.items():
            if self.args.resume or stage in self.args.keep:
                for name in files:
                    (self.work / name).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy2(MODEL_DIR / name, self.work / name)
        if self.args.resume or "vae" in self.args.keep:
            shutil.copy2(MODEL_DIR / "reel.json", self.work / "reel.json")

    def flags(self, name: str) -> list[str]:
        """A part's command line at this moment."""
        tries, late = self.stages[name].tries, time.time() - self.begin
        out = ["--out", str(self.work)]
        end = {"vae": self.args.vae_share, "text": 0.15, "classifier": 0.30, "experts": 0.91}[name]
        seconds = {"vae": 1e4, "text": 0.055, "classifier": 0.15, "experts": 1e4}[name] * self.args.seconds
        until = self.at(end)
        if tries and name != "experts":  # a second try gets its time, at the experts' cost
            until = max(until, time.time() + 0.2 * float(self.args.seconds))
        flags = [*out, "--seconds", f"{seconds:.0f}", "--until", f"{until:.1f}"]
        resumed = self.args.resume or (tries > 0 and name == "experts" and self.has("experts"))
        flags += ["--resume"] * resumed
        if name == "vae":
            flags += ["--mode", VAE_MODES[min(tries, 2)]] + ["--decoder-only"] * self.args.decoder_only
        if name == "experts":
            flags += ["--wait-until", f"{self.at(0.7):.1f}", "--save-every", "45"]
            flags += ["--cache-seconds", f"{self.args.cache_share * self.args.seconds:.0f}"]
            flags += ["--seed", str(self.args.seed)] + ["--no-compile"] * (tries > 0)
        if self.args.rehearse:
            flags += REHEARSAL[name]
        say(name, f"{late:.0f} s in")
        return flags

    def has(self, stage: str) -> bool:
        """Whether a part's weights lie in the working folder."""
        return all((self.work / name).exists() for name in STAGE_FILES[stage])

    def publish(self) -> None:
        """Copy what is new to --out."""
        for name, flat in FLAT.items():
            path = self.work / name
            if path.exists() and self.copied.get(path) != path.stat().st_mtime:
                self.copied[path] = path.stat().st_mtime
                shutil.copyfile(path, self.args.out / flat)
                say("run_all", f"kept {flat}, {path.stat().st_size / 2**20:.2f} MiB")
        with tarfile.open(self.work / EXTRAS, "w:gz") as tar:
            names = ["reel.json", "results.json", "sheet.png", "google", "train/curves", "logs"]
            names += [f"{which}_noise_model/config.json" for which in ("high", "low")]
            for name in names:
                if (self.work / name).exists():
                    tar.add(self.work / name, name)
        shutil.copyfile(self.work / EXTRAS, self.args.out / EXTRAS)

    def settle(self, name: str, code: int) -> None:
        """A part has ended: go on, or try again in a safer way."""
        stage = self.stages[name]
        say(name, f"ended with {code} after {time.time() - self.begin:.1f} s")
        self.publish()
        if code == 0 or (name == "vae" and self.has("vae")):
            return
        most = {"vae": 3, "text": 2, "classifier": 2, "experts": 2}[name]
        if stage.tries < most and time.time() < self.at(0.8):
            stage.start(self.flags(name))
        else:
            stage.failed = True

    def go(self) -> None:
        """Everything."""
        self.bring_in()
        todo = [name for name in STAGE_FILES if name not in self.args.keep]
        for name in ("vae", "text", "experts"):
            if name in todo:
                self.stages[name].start(self.flags(name))
        waiting = "classifier" in todo
        last = time.time()
        while True:
            time.sleep(0.5)
            for stage in self.stages.values():
                stage.relay()
            if waiting and (self.stages["text"].process is None or time.time() > self.at(0.15)):
                waiting = False
                self.stages["classifier"].start(self.flags("classifier"))
            for name, stage in self.stages.items():
                code = stage.ended()
                if code is not None:
                    stage.relay()
                    self.settle(name, code)
            if time.time() - last > 15:
                self.publish()
                last = time.time()
            if not waiting and all(stage.process is None for stage in self.stages.values()):
                break
            if time.time() > self.at(1.0) and not self.args.rehearse:
                say("run_all", "out of time")
                break
        self.finish()

    def finish(self) -> None:
        """End what still runs, keep what there is, say what it is."""
        for stage in self.stages.values():
            if stage.process is not None:
                stage.process.kill()
                stage.process.wait()
            stage.relay()
        self.publish()
        for path in sorted(self.args.out.iterdir()):
            say("run_all", f"{path.name}: {path.stat().st_size / 2**20:.2f} MiB")
        say("run_all", f"{time.time() - self.begin:.1f} s in all")
        if any(stage.failed for stage in self.stages.values()):
            raise SystemExit(1)


def say(name: str, line: str) -> None:
    """One line of the run's output; parts' own lines carry their name already."""
    print(line if line.startswith(name) else f"{name}: {line}", flush=True)


def main() -> None:
    """Parse, then run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "out/demo-training")))
    parser.add_argument("--work", type=Path, default=Path("build/demo-training"), help="working folder")
    parser.add_argument("--seconds", type=float, default=400, help="wall-clock budget of everything")
    parser.add_argument("--resume", action="store_true", help="start from the weights in models/demo")
    parser.add_argument("--keep", nargs="*", default=[], choices=list(STAGE_FILES), help="don't train these")
    parser.add_argument("--decoder-only", action="store_true", help="keep the latents as they are")
    parser.add_argument("--vae-share", type=float, default=0.30, help="of the budget, by its end")
    parser.add_argument("--cache-share", type=float, default=0.06, help="of the budget, for latents")
    parser.add_argument("--seed", type=int, default=2026, help="of the experts' clips")
    parser.add_argument("--rehearse", action="store_true", help="a few steps of each part")
    args = parser.parse_args()
    Run(args).go()


if __name__ == "__main__":
    main()
