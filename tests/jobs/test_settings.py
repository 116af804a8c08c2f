"""Settings: secrets may come as mounted files."""

from pathlib import Path

import pytest
from pydantic import SecretStr

from jobs.settings import Settings


@pytest.mark.parametrize("name", ["secret_key", "s3_secret_key", "metrics_token", "redis_url"])
def test_a_secret_comes_from_a_file(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "secret").write_text("redis://from-a-file-of-32-characters-or-more:6379/0\n")
    monkeypatch.setenv(f"REEL_{name.upper()}_FILE", str(tmp_path / "secret"))
    found = getattr(Settings(), name)
    text = found.get_secret_value() if isinstance(found, SecretStr) else found
    assert text == "redis://from-a-file-of-32-characters-or-more:6379/0"
