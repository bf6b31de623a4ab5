"""Packs images by `tools.prepare_images` with a commit after every image, and is killed on the way:

    python tests/kill_packing.py SOURCE OUT SIZE KILL...

KILL: "4" ends an attempt by SIGKILL in its fourth fsync or rename, where half of what was not yet flushed is lost;
"0.05s" after that many seconds. The attempt after the last is left alone. Prints a JSON list of exit statuses.
Attempts are forks of one process, so that they need not import torch each time.
"""

import json
import os
import signal
import sys
import time

from biggan.data import resumable
from runtime.cli import run_command
from tools import prepare_images


def die_at(calls):
    """Ends this process in its `calls`-th fsync or rename, before or after it."""
    left, flushed, fsync, replace = [calls], {}, os.fsync, os.replace

    def dying():
        left[0] -= 1
        return left[0] == 0

    def fsync_or_die(handle):
        size = os.fstat(handle).st_size
        if dying():
            os.truncate(handle, (size + flushed.get(handle, size)) // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(handle)
        flushed[handle] = size

    def replace_and_die(*paths):
        replace(*paths)
        if dying():
            os.kill(os.getpid(), signal.SIGKILL)

    os.fsync, os.replace = fsync_or_die, replace_and_die


def attempt(arguments, kill):
    """Packs in a fork, and returns how it ended."""
    pid = os.fork()
    if not pid:
        status = 1
        try:
            if kill and not kill.endswith("s"):
                die_at(int(kill))
            status = run_command(prepare_images.main, arguments)
        finally:
            sys.stdout.flush()
            os._exit(status)
    if kill and kill.endswith("s"):
        time.sleep(float(kill[:-1]))
        os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


if __name__ == "__main__":
    source, out, size, *kills = sys.argv[1:]
    resumable._SECONDS_BETWEEN_COMMITS = 0
    statuses = [attempt([source, out, "--size", size, "--workers", "2"], kill) for kill in [*kills, None]]
    print(json.dumps(statuses))
