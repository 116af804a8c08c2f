"""Logs: JSON lines with bound ids, never prompts or secrets."""

import json
import logging
import subprocess
import sys

SCRIPT = """
import logging
from jobs.log import bind, get_logger, setup_logging, unbind
setup_logging("api", "info")
bind(job_id="job_1")
get_logger("x").info("claimed", prompt="a secret cat", api_key="rk_1", node="n")
unbind("job_id")
logging.getLogger("other").warning("plain %s", "words")
logging.getLogger("other").info("job %s: sent msg_%s_2", "job_" + "0" * 25, "1" * 25)
logging.getLogger("botocore").info("chatter")
try:
    1 / 0
except ZeroDivisionError:
    get_logger("x").exception("broke")
"""


def test_lines() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    claimed, plain, named, broke = map(json.loads, done.stderr.splitlines())
    assert (claimed["event"], claimed["job_id"], claimed["role"], claimed["node"]) == (
        "claimed",
        "job_1",
        "api",
        "n",
    )
    assert claimed["level"] == "info"
    assert "secret cat" not in done.stderr
    assert "rk_1" not in done.stderr
    assert (plain["event"], plain["level"], plain["logger"]) == ("plain words", "warning", "other")
    assert "job_id" not in plain
    assert (named["job_id"], named["delivery_id"]) == ("job_" + "0" * 25, "msg_" + "1" * 25 + "_2")
    assert "ZeroDivisionError" in broke["exception"]
    assert logging.getLogger().handlers is not None
