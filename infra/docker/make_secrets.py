"""Make the secrets that docker-compose.yml mounts, once: `python infra/docker/make_secrets.py [FOLDER]`.

    python infra/docker/make_secrets.py --redis rediss://redis.example.com:6380    for parts elsewhere
    python infra/docker/make_secrets.py --rotate node     a second password for a role, beside the old one
    python infra/docker/make_secrets.py --finish node     the old one goes

Standard library only. An existing folder is left alone, so that a second run changes no password. Redis and
S3 get one user a role, here and in the local stack: a node can neither read API keys or webhook secrets, nor
make keys, nor administer Redis, and in S3 it reads input images and writes videos alone.
"""

import argparse
import json
import re
import secrets
import sys
from pathlib import Path

REDIS = "redis://redis:6379"
BUCKET = "reelserve"
# Keys that claims, heartbeats, ends and sweeps touch: all of jobs/scripts.py but API keys and limits.
JOB_KEYS = (
    "job", "body", "events", "lane", "lanes", "rising", "vtime", "waiting", "running", "leases", "wake",
    "claim", "list", "idem", "delivery", "deliveries", "pending", "gone", "node", "drain",
    "endpoints", "timings",
)  # fmt: skip
WHOLE_KEYS = (
    "queues",
    "deadlines",
    "fence",
    "retention",
    "dead",
    "garbage",
    "outbox",
    "outbox:dead",
    "outcomes",
    "nodes",
    "models",
    "uploads",
    "uploads:users",
)
ROLES = ("api", "celery", "node", "scaler", "ops")
S3_ROLES = ("api", "celery", "node", "ops")  # the scaler has no business there


def key_patterns(role: str) -> str:
    """Which keys a role's user may touch."""
    if role not in ("node", "scaler"):
        return "~reel:*"
    more = ["~reel:scaler:*"] if role == "scaler" else []
    return " ".join(
        [*(f"~reel:{name}:*" for name in JOB_KEYS), *(f"~reel:{name}" for name in WHOLE_KEYS), *more]
    )


def acl(passwords: dict[str, str]) -> str:
    """The users.acl of Redis: no default user, one a role, no administration except for `ops`."""
    lines = ["user default off nopass nocommands"]
    for role in ROLES:
        rights = "+@all" if role == "ops" else "+@all -@admin -@dangerous +info"
        lines.append(f"user {role} on >{passwords[role]} {key_patterns(role)} resetchannels &reel:* {rights}")
    return "\n".join(lines) + "\n"


def s3(secret_keys: dict[str, str], bucket: str = BUCKET) -> str:
    """SeaweedFS' identities: a role's access key is its name. Celery makes the bucket and removes files."""
    everything = ["Admin", "Read", "Write", "List", "Tagging"]
    actions = {
        "api": [f"{verb}:{bucket}" for verb in ("Read", "Write", "List")],
        "celery": everything,
        "node": [
            f"Read:{bucket}/uploads/*", f"Read:{bucket}/jobs/*", f"Write:{bucket}/jobs/*", f"List:{bucket}"
        ],
        "ops": everything,
    }  # fmt: skip
    identities = [
        {
            "name": role,
            "credentials": [{"accessKey": role, "secretKey": secret_keys[role]}],
            "actions": actions[role],
        }
        for role in S3_ROLES
    ]
    return json.dumps({"identities": identities}, indent=1) + "\n"


def make(folder: Path, redis: str = REDIS) -> None:
    """Write every secret into `folder`, which its owner alone can enter. redis: where the parts find it.

    Values end without a newline, so that `kubectl create secret --from-file` takes them as they are.
    """
    scheme, _, host = redis.rstrip("/").partition("://")
    folder.mkdir(parents=True, mode=0o700)
    passwords = {role: secrets.token_hex(24) for role in ROLES}
    s3_secrets = {role: secrets.token_hex(24) for role in S3_ROLES}
    files = {
        "users.acl": acl(passwords),
        "secret_key": secrets.token_hex(32),
        "s3.json": s3(s3_secrets),
        **{f"s3_secret_{role}": s3_secrets[role] for role in S3_ROLES},
        "grafana_password": secrets.token_hex(12),
        **{f"redis_url_{role}": f"{scheme}://{role}:{passwords[role]}@{host}/0" for role in ROLES},
    }
    for name, text in files.items():
        write(folder / name, text)


def write(path: Path, text: str) -> None:
    """In place, since a container that has the file mounted sees this one and no successor of its name."""
    path.touch(mode=0o600)
    path.chmod(0o600)
    path.write_text(text)
    path.chmod(0o444)  # the folder is closed; inside their containers other users read the files


def rotate(folder: Path, role: str) -> None:
    """Give a role's Redis user a new password beside its old one, and its URL the new one.

    `ops` keeps its URL until `finish`: by that Redis is told to read the new password (ACL LOAD).
    """
    acl, new = folder / "users.acl", secrets.token_hex(24)
    write(acl, re.sub(rf"^(user {role} on) ", rf"\1 >{new} ", acl.read_text(), flags=re.MULTILINE))
    if role != "ops":
        set_password(folder, role, new)


def finish(folder: Path, role: str) -> None:
    """Leave a role's Redis user no password but its newest, which its URL has then."""
    acl = folder / "users.acl"
    text = acl.read_text()
    newest = re.search(rf"^user {role} on >(\S+)", text, flags=re.MULTILINE)
    if newest is None:
        raise ValueError(f"{acl} has no password of {role}; expected `user {role} on >PASSWORD ...`")
    users = re.sub(rf"^(user {role} on)( >\S+)+", rf"\1 >{newest[1]}", text, flags=re.MULTILINE)
    write(acl, users)
    set_password(folder, role, newest[1])


def set_password(folder: Path, role: str, password: str) -> None:
    """Put it into the role's URL."""
    url = folder / f"redis_url_{role}"
    write(url, re.sub(r"(?<=//)[^@]*(?=@)", f"{role}:{password}", url.read_text()))


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", nargs="?", type=Path, default=Path("secrets"))
    parser.add_argument("--redis", default=REDIS, metavar="URL", help="where the parts find Redis")
    step = parser.add_mutually_exclusive_group()
    step.add_argument("--rotate", choices=ROLES)
    step.add_argument("--finish", choices=ROLES)
    args = parser.parse_args()
    folder: Path = args.folder
    if role := args.rotate or args.finish:
        if not folder.is_dir():
            sys.exit(f"{folder} is not there: run this without --rotate or --finish first")
        (rotate if args.rotate else finish)(folder, role)
        restart = "" if role == "ops" else "restart what logs in as it, "
        then = f"{restart}then --finish" if args.rotate else "the old password is void then"
        print(f"changed {role} in {folder}: have Redis read it (ACL LOAD); {then}")
    elif folder.exists():
        print(f"{folder} is there already: nothing was changed")
    else:
        if not re.fullmatch(r"rediss?://[^/@\s]+", args.redis):
            parser.error(f"--redis: got {args.redis!r}, expected redis://HOST:PORT or rediss://HOST:PORT")
        make(folder, args.redis)
        print(f"made {folder}; keep it out of version control and backups that others read")


if __name__ == "__main__":
    main()
