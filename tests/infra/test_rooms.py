"""Imports go one way, and nothing outside tests/ is fake."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("jobs", "api", "worker", "engine", "kernels", "infra")
MAY_IMPORT = {
    "jobs": {"jobs"},
    "kernels": {"kernels"},
    "api": {"api", "jobs"},
    "engine": {"engine", "kernels"},
    "worker": {"worker", "jobs", "engine"},
    "infra": set(ROOMS),
}
KNOWS = {
    "ray": {"worker"},
    "celery": {"worker"},
    "fastapi": {"api"},
    "torch": {"engine", "kernels", "worker"},
}


def sources(*rooms: str) -> list[Path]:
    return [path for room in rooms for path in sorted((ROOT / room).rglob("*.py"))]


def imports(tree: ast.AST) -> Iterator[str]:
    """Every module that is imported anywhere in the file, also inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide which room is meant"
            yield node.module or ""


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_the_rooms_that_it_may(room: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sources(room)
        for name in imports(ast.parse(path.read_text()))
        if name.partition(".")[0] in {*ROOMS, "tests", "benchmarks"} - MAY_IMPORT[room]
    ]
    assert wrong == []


@pytest.mark.parametrize("library", KNOWS)
def test_a_library_stays_in_its_rooms(library: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for room in ROOMS
        if room not in KNOWS[library]
        for path in sources(room)
        for name in imports(ast.parse(path.read_text()))
        if name.partition(".")[0] == library
    ]
    assert wrong == []


def test_kernels_can_be_imported_without_triton_and_is_not_taken_for_the_pypi_package() -> None:
    """transformers looks for a package called `kernels`; it must not take ours for that one."""
    code = (
        "import sys, kernels; assert 'triton' not in sys.modules, 'kernels imports triton'\n"
        "assert 'torch' not in sys.modules, 'kernels imports torch'\n"
        "from transformers.utils.import_utils import is_kernels_available\n"
        "assert not is_kernels_available(), 'transformers takes our kernels for the package of that name'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr


def test_nothing_outside_tests_is_a_stand_in() -> None:
    """No mocking library, and no class or function that calls itself fake."""
    libraries = {"unittest", "mock", "moto", "fakeredis", "responses", "respx", "pytest", "hypothesis"}
    name = re.compile(r"fake|mock|stub|dummy|pretend|standin", re.IGNORECASE)
    wrong = []
    for path in sources(*ROOMS):
        tree = ast.parse(path.read_text())
        found = [module for module in imports(tree) if module.partition(".")[0] in libraries]
        found += [
            node.name
            for node in ast.walk(tree)
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            and name.search(node.name)
        ]
        wrong += [f"{path.relative_to(ROOT)}: {item}" for item in found]
    assert wrong == []


def test_nothing_is_left_undone() -> None:
    """No mark that something is still to be written."""
    wrong = []
    for path in sources(*ROOMS):
        text = path.read_text()
        wrong += [
            f"{path.relative_to(ROOT)}: {mark}" for mark in ("TODO", "FIXME", "XXX", "HACK") if mark in text
        ]
    assert wrong == []


def test_every_folder_with_code_is_a_package() -> None:
    folders = {path.parent for path in sources(*ROOMS)} - {ROOT / "infra" / "docker"}  # copied into images
    assert [str(f.relative_to(ROOT)) for f in sorted(folders) if not (f / "__init__.py").exists()] == []


def test_every_lua_script_page_and_table_is_packaged() -> None:
    """What is not Python must match a package-data pattern, or an installed wheel lacks it."""
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    listed = subprocess.run(["git", "ls-files", *ROOMS], capture_output=True, text=True, cwd=ROOT, check=True)
    data = [Path(line) for line in listed.stdout.splitlines() if not line.endswith((".py", ".md"))]
    assert any(path.suffix == ".lua" for path in data), (
        "no Lua script is tracked: is this test looking right?"
    )
    missing = [
        str(path)
        for path in data
        if not any(
            fnmatch(str(path.relative_to(path.parts[0])), glob) for glob in patterns.get(path.parts[0], [])
        )
    ]
    assert missing == []
