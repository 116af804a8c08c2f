"""Process housekeeping on Linux: adopt orphans, and leave none behind."""

import contextlib
import ctypes
import logging
import os
import sys

import psutil

PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
log = logging.getLogger(__name__)


def adopt_orphans() -> None:
    """Make this process the parent of descendants whose own parent dies, so that they can be found and ended.

    Without it, Ray's agents and workers would move to init when the raylet is killed. Linux only; elsewhere
    Ray's own, slower, checks have to do.
    """
    if sys.platform != "linux":
        return
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        log.warning("cannot adopt orphans: %s", os.strerror(ctypes.get_errno()))


def kill_descendants(timeout: float = 10.0) -> None:
    """SIGKILL every descendant and reap it, again and again until none is left or `timeout` seconds passed.

    A process may fork while its parent is being killed, hence the loop.
    """
    me = psutil.Process()
    for _ in range(20):
        family = me.children(recursive=True)
        if not family:
            return
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(family, timeout=timeout / 20)
    log.warning("processes that would not die: %s", [p.pid for p in me.children(recursive=True)])


def alive(process: psutil.Process) -> bool:
    """Whether a process still runs (a zombie does not)."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
