"""A container's health check: `python -m infra.docker.healthcheck api | celery | node | metrics PORT`; exit
code 0: healthy.

api: /healthz answers 200. celery: Redis answers (the process itself is the container's). metrics: /metrics on
PORT answers 200. node: the registry has heard of it within HEARD seconds; a node is its container's only user
of REEL_NODE_ID, or of its host name's.
"""

import os
import socket
import sys
import urllib.error
import urllib.request

HEARD = 15.0  # seconds by Redis' clock; a node reports every second


def api() -> bool:
    """Whether the process answers; /readyz would also need a node, which may come later."""
    return _answers(os.environ.get("REEL_API_PORT", "8080"), "healthz")


def metrics() -> bool:
    """Whether an exporter serves its metrics."""
    return _answers(sys.argv[2], "metrics")


def celery() -> bool:
    """Whether the broker answers."""
    from jobs.client import connect
    from jobs.settings import Settings

    return bool(connect(Settings()).execute_command("PING"))


def node() -> bool:
    """Whether this node reports."""
    from jobs.client import connect
    from jobs.nodes import NodeRegistry
    from jobs.settings import Settings

    settings = Settings()
    client = connect(settings)
    now = float(client.execute_command("TIME")[0])
    nodes = [one for one in NodeRegistry(client).list() if now - one.seen_at < HEARD]
    host = socket.gethostname()
    return any(one.id == settings.node_id if settings.node_id else one.host == host for one in nodes)


def _answers(port: str, path: str) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/{path}", timeout=4) as answer:
            return bool(answer.status == 200)
    except (OSError, urllib.error.URLError):
        return False


if __name__ == "__main__":
    checks = {"api": api, "celery": celery, "node": node, "metrics": metrics}
    if len(sys.argv) != (3 if sys.argv[1:2] == ["metrics"] else 2) or sys.argv[1] not in checks:
        sys.exit(f"got {sys.argv[1:]}, expected one of {', '.join(checks)}, with a port after metrics")
    try:
        sys.exit(0 if checks[sys.argv[1]]() else 1)
    except Exception as error:
        sys.exit(f"unhealthy: {error}")
