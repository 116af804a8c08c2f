"""Make the secrets that docker-compose.yml mounts, once: `python infra/docker/make_secrets.py [FOLDER]`.

Standard library only. An existing folder is left alone, so that a second run changes no password. Redis gets
one user a role: a node can neither read API keys nor administer Redis.
"""

import json
import secrets
import sys
from pathlib import Path

HOST = "redis:6379"
# Keys that claims, heartbeats, ends and sweeps touch: all of jobs/scripts.py but API keys and limits.
JOB_KEYS = (
    "job", "body", "events", "lane", "lanes", "rising", "vtime", "waiting", "running", "leases", "wake",
    "claim", "list", "idem", "delivery", "deliveries", "pending", "gone", "node", "drain",
    "endpoints", "timings",
)  # fmt: skip
WHOLE_KEYS = (
    "queues",
    "deadlines",
    "retention",
    "dead",
    "garbage",
    "outbox",
    "outbox:dead",
    "nodes",
    "models",
)
ROLES = ("api", "celery", "node", "ops")


def key_patterns(role: str) -> str:
    """Which keys a role's user may touch."""
    if role != "node":
        return "~reel:*"
    return " ".join([*(f"~reel:{name}:*" for name in JOB_KEYS), *(f"~reel:{name}" for name in WHOLE_KEYS)])


def acl(passwords: dict[str, str]) -> str:
    """The users.acl of Redis: no default user, one a role, no administration except for `ops`."""
    lines = ["user default off nopass nocommands"]
    for role in ROLES:
        rights = "+@all" if role == "ops" else "+@all -@admin -@dangerous +info"
        lines.append(f"user {role} on >{passwords[role]} {key_patterns(role)} resetchannels &reel:* {rights}")
    return "\n".join(lines) + "\n"


def s3(access: str, secret: str) -> str:
    """SeaweedFS' identities."""
    identity = {
        "name": "reelserve",
        "credentials": [{"accessKey": access, "secretKey": secret}],
        "actions": ["Admin", "Read", "Write", "List", "Tagging"],
    }
    return json.dumps({"identities": [identity]}, indent=1) + "\n"


def make(folder: Path, host: str = HOST) -> None:
    """Write every secret into `folder`, each file readable by its owner alone."""
    folder.mkdir(parents=True, mode=0o700)
    passwords = {role: secrets.token_hex(24) for role in ROLES}
    s3_secret = secrets.token_hex(24)
    files = {
        "users.acl": acl(passwords),
        "secret_key": secrets.token_hex(32) + "\n",
        "s3_secret_key": s3_secret + "\n",
        "s3.json": s3("reelserve", s3_secret),
        "grafana_password": secrets.token_hex(12) + "\n",
        **{f"redis_url_{role}": f"redis://{role}:{passwords[role]}@{host}/0\n" for role in ROLES},
    }
    for name, text in files.items():
        path = folder / name
        path.touch(mode=0o600)
        path.write_text(text)
        path.chmod(0o444)  # the folder is closed; inside their containers other users read the files


def main() -> None:
    """The command."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path("secrets")
    if folder.exists():
        print(f"{folder} is there already: nothing was changed")
        return
    make(folder)
    print(f"made {folder}; keep it out of version control and backups that others read")


if __name__ == "__main__":
    main()
