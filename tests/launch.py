"""Starts programs the way torchrun does, and reads what they say."""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def environment(**extra):
    path = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | {key: str(value) for key, value in extra.items()}


def run(command, **extra):
    """Runs `python *command` in the repository's root and returns its standard error; `extra` environment variables."""
    command = [sys.executable, *map(str, command)]
    done = subprocess.run(command, cwd=ROOT, env=environment(**extra), capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stderr


def start_processes(count, command, **extra):
    """Starts `python *command` in `count` processes that find each other, with the variables that torchrun sets."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    shared = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count} | extra
    return [
        subprocess.Popen(
            [sys.executable, *map(str, command)],
            cwd=ROOT,
            env=environment(RANK=i, LOCAL_RANK=i, **shared),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(count)
    ]


def run_processes(count, command, **extra):
    """As `start_processes`; waits for all and returns what each wrote to its standard output."""
    processes = start_processes(count, command, **extra)
    said = [process.communicate(timeout=300) for process in processes]
    assert all(process.returncode == 0 for process in processes), "\n".join(error[-2000:] for _, error in said)
    return [out for out, _ in said]
