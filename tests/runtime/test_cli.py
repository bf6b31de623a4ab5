"""Exit codes and messages."""

import os
import platform
import subprocess
import sys

import pytest

from runtime.cli import CommandParser, run_command
from runtime.errors import RunError, UserError


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (UserError("mend this"), 2, "error: mend this"),
        (RunError("it broke"), 1, "error: it broke"),
        (OSError(28, "No space left on device", "x.pt"), 1, "error: No space left on device: x.pt"),
        (MemoryError(), 1, "error: out of memory"),
        (KeyboardInterrupt(), 130, "error: interrupted"),
    ],
)
def test_exceptions_become_codes(capsys, error, code, text):
    def main(argv):
        raise error

    assert run_command(main, []) == code
    assert capsys.readouterr().err.startswith(text)


def test_a_defect_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        run_command(lambda argv: 1 // 0, [])


def test_success_and_parser_errors(capsys):
    assert run_command(lambda argv: None, []) == 0
    parser = CommandParser(prog="tool")
    parser.add_argument("--number", type=int)
    assert run_command(lambda argv: parser.parse_args(argv) and None, ["--numbr", "3"]) == 2
    assert "did you mean --number? See 'tool --help'" in capsys.readouterr().err
    assert run_command(lambda argv: parser.parse_args(argv) and None, ["--number", "x"]) == 2
    assert "tool --help" in capsys.readouterr().err


def test_names_of_files_do_not_command_the_terminal(capsys):
    def main(argv):
        raise UserError("a\x1b[2Jb.png is damaged\nsecond line, é")

    assert run_command(main, []) == 2
    assert capsys.readouterr().err == "error: a\\x1b[2Jb.png is damaged\nsecond line, é\n"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators have their own rules")
@pytest.mark.parametrize("keep", ["0", "1"])
def test_memory_of_freed_tensors_is_kept(keep):
    program = """
import resource, torch
import runtime.cli
faults = [resource.getrusage(resource.RUSAGE_SELF).ru_minflt]
for _ in range(6):
    tensors = [torch.ones(3_000_000) for _ in range(8)]
    del tensors
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(*faults)
"""
    command, env = [sys.executable, "-c", program], os.environ | {"KEEP_FREED_MEMORY": keep}
    output = subprocess.run(command, capture_output=True, text=True, check=True, env=env).stdout
    before, first, *_, last = map(int, output.split())
    # Five rounds after the first, which would each take as many pages.
    assert (last - first < first - before) == (keep == "1")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators have their own rules")
def test_kept_memory_can_be_handed_back():
    program = """
import os, torch
from pathlib import Path
from runtime.cli import return_freed_memory
resident = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
tensors = [torch.ones(3_000_000) for _ in range(8)]
later = torch.ones(1)  # what lies behind them must not keep them
del tensors
kept = resident()
return_freed_memory()
print(kept - resident())
"""
    env = os.environ | {"KEEP_FREED_MEMORY": "1"}
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=env).stdout
    assert int(output) > 0.9 * 8 * 12_000_000


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({}, "PASSIVE 3000"),
        ({"OMP_WAIT_POLICY": "passive"}, "passive 3000"),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE None"),
        ({"GOMP_SPINCOUNT": "0"}, "PASSIVE 0"),
    ],
)
def test_threads_wait_as_the_user_says(given, found):
    program = "import os, runtime.cli; print(*map(os.environ.get, ('OMP_WAIT_POLICY', 'GOMP_SPINCOUNT')))"
    env = {name: x for name, x in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")} | given
    command = [sys.executable, "-c", program]
    assert subprocess.run(command, capture_output=True, text=True, check=True, env=env).stdout.strip() == found
