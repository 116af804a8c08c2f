"""Every dependency is pinned, and docs/log.md says why it is there."""

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
BY_ROLE = {"all": PROJECT["dependencies"], **PROJECT["optional-dependencies"]}
RANGES = {"torch", "triton"}  # a GPU node takes the build that fits its driver


def name_of(requirement: str) -> str:
    return re.split(r"[\[=<>;]", requirement, maxsplit=1)[0]


@pytest.mark.parametrize("role", BY_ROLE)
def test_pinned_and_explained(role: str) -> None:
    log = (ROOT / "docs" / "log.md").read_text()
    for requirement in BY_ROLE[role]:
        name = name_of(requirement)
        if name == "reelserve":
            continue
        assert "==" in requirement or name in RANGES, f"{requirement} is not pinned"
        assert f"`{name}`" in log, f"docs/log.md does not say why {name} is there"


def test_the_api_needs_no_torch() -> None:
    wanted = {name_of(requirement) for requirement in (*BY_ROLE["all"], *BY_ROLE["api"])}
    assert not wanted & {"torch", "triton", "transformers", "ray", "celery"}
