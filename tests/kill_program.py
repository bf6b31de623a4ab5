"""Trains one run as it is, and another that it kills on the way:

    python tests/kill_program.py CONFIGS.json KILLS CPU_SECONDS SEED

CONFIGS.json: {"package": "biggan" or "hrrformer", "whole": {...}, "broken": {...}}. All but the last attempt at the
second are killed after up to CPU_SECONDS of their own processor time: three of five by SIGKILL, one of five by SIGTERM,
and one of five ends itself by SIGKILL in one of its writes to the disk. Prints a JSON list of how each attempt ended:
[planned, signal or status]. Attempts are forks of one process, so that they need not import torch each time.
"""

import contextlib
import importlib
import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import torch
from torch.utils import tensorboard  # noqa: F401 - imported once for all forks

from runtime.config import from_dict

TICKS_PER_SEC = os.sysconf("SC_CLK_TCK")


def die_at(calls):
    """Ends this process in its `calls`-th fsync or rename of a file: whichever comes, before or after it."""
    left, fsync, replace = [calls], os.fsync, os.replace

    def dying():
        left[0] -= 1
        return left[0] == 0

    def fsync_or_die(handle):
        if dying():
            if os.readlink(f"/proc/self/fd/{handle}").endswith(".writing"):  # half of the file has reached the disk
                os.truncate(handle, os.fstat(handle).st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(handle)

    def replace_and_die(*paths):
        replace(*paths)
        if dying():
            os.kill(os.getpid(), signal.SIGKILL)

    os.fsync, os.replace = fsync_or_die, replace_and_die


def attempt(train, config, calls=None):
    """Forks a process that trains, and returns its number."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        torch.set_num_threads(1)
        if calls:
            die_at(calls)
        with contextlib.redirect_stdout(sys.stderr):
            train(config)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def processor_time(pid):
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / TICKS_PER_SEC


def kill_after(pid, seconds, number):
    """Sends the signal when the process has worked that long, unless it has ended by then."""
    while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if processor_time(pid) >= seconds:
            return os.kill(pid, number)
        time.sleep(0.004 * random.random())


def status_of(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def finish(train, config):
    return status_of(attempt(train, config))


def main(path, kills, seconds, seed):
    chosen = json.loads(Path(path).read_text())
    package, draw = chosen["package"], random.Random(seed)
    config_class = importlib.import_module(f"{package}.config").TrainConfig
    train = importlib.import_module(f"{package}.training").train
    whole, config = (from_dict(config_class, chosen[key]) for key in ("whole", "broken"))
    ends = [("whole", finish(train, whole))]
    for i in range(kills):
        plan = ("kill", "kill", "term", "write", "kill")[i % 5]
        pid = attempt(train, config, draw.randint(1, 20) if plan == "write" else None)
        if plan != "write":
            kill_after(pid, draw.uniform(0, seconds), signal.SIGTERM if plan == "term" else signal.SIGKILL)
        ends.append((plan, status_of(pid)))
    ends.append(("finish", finish(train, config)))
    print(json.dumps(ends))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4]))
