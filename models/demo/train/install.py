"""Brings what a training machine sent back into models/demo.

python -m models.demo.train.install FOLDER
"""

import argparse
import shutil
import tarfile
from pathlib import Path

from models.demo.train.files import EXTRAS, FLAT, MODEL_DIR


def install(folder: Path, target: Path = MODEL_DIR) -> list[str]:
    """Copy the weights to their places and unpack the rest; the names of what came. Logs stay behind."""
    done = []
    for name, flat in FLAT.items():
        if (folder / flat).exists():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / flat, target / name)
            done.append(name)
    with tarfile.open(folder / EXTRAS) as tar:
        members = [m for m in tar.getmembers() if m.isfile() and not m.name.startswith("logs/")]
        tar.extractall(target, members=members, filter="data")
        done += [member.name for member in members]
    return done


def main() -> None:
    """Install and list."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--target", type=Path, default=MODEL_DIR)
    args = parser.parse_args()
    print(*install(args.folder, args.target), sep="\n")


if __name__ == "__main__":
    main()
