"""Keep the file map of docs/architecture.md true: one line per source file, from its docstring.

Run with `--write` to renew the map; without it, exits 1 when the map differs from the code.
"""

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "architecture.md"
ROOMS = ("jobs", "api", "worker", "engine", "kernels", "infra", "benchmarks", "models")
BEGIN, END = "<!-- file map: begin -->", "<!-- file map: end -->"


def summary(path: Path) -> str:
    """The first sentence of a file's docstring, or of its leading Lua comment."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        doc = ast.get_docstring(ast.parse(text)) or ""
    else:
        doc = " ".join(line.lstrip("-# ") for line in text.splitlines() if line.startswith(("--", "# ")))
    first = re.split(r"(?<=[.])\s|\n\n", doc.replace("\n", " ").strip() + " ", maxsplit=1)[0]
    return first.strip().rstrip(".:;").replace("|", "\\|")


def file_map() -> str:
    """The Markdown of the map, a table a room."""
    parts = []
    for room in ROOMS:
        files = sorted(p for p in (ROOT / room).rglob("*") if p.suffix in {".py", ".lua"})
        rows = [
            f"| `{p.relative_to(ROOT)}` | {summary(p)} |"
            for p in files
            if p.name != "__init__.py" or p.parent == ROOT / room or len(p.read_text().splitlines()) > 3
        ]
        if rows:
            parts.append(f"### {room}/\n\n| file | what it is |\n|---|---|\n" + "\n".join(rows))
    return "\n\n".join(parts)


def main() -> int:
    """Compare or write; returns the exit code."""
    page = PAGE.read_text(encoding="utf-8")
    head, rest = page.split(BEGIN)
    _, tail = rest.split(END)
    renewed = f"{head}{BEGIN}\n\n{file_map()}\n\n{END}{tail}"
    if "--write" in sys.argv:
        PAGE.write_text(renewed, encoding="utf-8")
        return 0
    if renewed != page:
        print("docs/architecture.md: its file map differs from the code; run scripts/file_map.py --write")
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
