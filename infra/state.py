"""What a local stack remembers between starts: its secrets and ports; and the lock on its data dir."""

import contextlib
import fcntl
import json
import os
import secrets
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from infra.docker.make_secrets import ROLES, S3_ROLES
from infra.errors import CliError


@dataclass
class StackState:
    """Kept in ``stack.json``, readable by its owner alone."""

    port_base: int | None = None
    secret_key: str = field(default_factory=lambda: secrets.token_urlsafe(32))
    redis_passwords: dict[str, str] = field(default_factory=lambda: _one_each(ROLES))
    s3_secrets: dict[str, str] = field(default_factory=lambda: _one_each(S3_ROLES))
    api_key: str | None = None  # made when Redis is up
    webhook_secret: str | None = None

    @classmethod
    def load(cls, data_dir: Path) -> "StackState":
        """Read the data dir's state, or make a new one. Raises CliError on a damaged file."""
        path = data_dir / "stack.json"
        try:
            values = json.loads(path.read_text())
        except FileNotFoundError:
            return cls()
        except (OSError, ValueError) as error:
            raise CliError(f"{path} cannot be read ({error}); move the data dir away") from None
        known = {f.name for f in fields(cls)}
        state = cls(**{name: value for name, value in values.items() if name in known})
        # A stack of an older version may know fewer roles.
        state.redis_passwords = _one_each(ROLES) | state.redis_passwords
        state.s3_secrets = _one_each(S3_ROLES) | state.s3_secrets
        return state

    def save(self, data_dir: Path) -> None:
        """Write it: complete or not at all, mode 0600."""
        write_private(data_dir / "stack.json", json.dumps(asdict(self), indent=1) + "\n")


def _one_each(roles: tuple[str, ...]) -> dict[str, str]:
    return {role: secrets.token_hex(24) for role in roles}


def write_private(path: Path, text: str) -> None:
    """Replace a file by one that only its owner may read."""
    draft = path.with_name(path.name + ".new")
    with contextlib.suppress(FileNotFoundError):
        draft.unlink()
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)


def lock_data_dir(data_dir: Path, seconds: float = 15.0) -> int:
    """Make and lock a data dir; returns the lock's file descriptor. The kernel frees it when we die.

    Waits a little, because a stack that was just stopped may still be ending. Raises CliError when another
    stack keeps it, or when the folder cannot be written.
    """
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        data_dir.chmod(0o700)
        descriptor = os.open(data_dir / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise CliError(f"data dir {data_dir} cannot be used: {error.strerror}") from None
    deadline = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            owner = os.pread(descriptor, 32, 0).decode(errors="replace").strip()
            if time.monotonic() > deadline or _alive(owner):
                os.close(descriptor)
                raise CliError(
                    f"data dir {data_dir} is in use by another stack (pid {owner or 'unknown'}): "
                    "stop it, or give --data another folder"
                ) from None
        time.sleep(0.1)
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, str(os.getpid()).encode(), 0)
    return descriptor


def _alive(pid: str) -> bool:
    """Whether the lock's owner runs; if it does not, its guardian keeps the lock for a moment more."""
    import psutil

    try:
        return bool(psutil.Process(int(pid)).status() != psutil.STATUS_ZOMBIE)
    except (ValueError, psutil.Error):
        return False
