"""What every command shares: short error messages and exit codes (0 done, 2 wrong usage or input, 1 failed)."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import difflib
import importlib
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence

from runtime.errors import RunError, UserError, describe

# How threads wait for each other; read when torch loads its OpenMP, so set before. Threads that only spin cost up to
# ten times the time as soon as something else runs on the machine, and those that sleep at once a fifth more where
# nothing does: an idle core takes long to wake. So they spin for some 80 µs first: a step of `biggan` takes 0.84 to
# 0.91 of the time on two cores of its own, and 1.3 times it where another process works on one of them.
if os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE").upper() == "PASSIVE":
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")


def keep_freed_memory() -> None:
    """Lets the process keep the memory of freed tensors up to 32 MiB, and have larger ones on huge pages.

    A training step frees nearly all that it takes. glibc hands it back to the system, which clears every page that it
    hands out again: a thirtieth of a step of `biggan` on a CPU, and with pages of 4 KiB a sixth of one of `hrrformer`.
    Call it before torch's first allocation. Without glibc it has the huge pages alone.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD in malloc.h
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(mmap_threshold, 1 << 25)
        libc.mallopt(trim_threshold, (1 << 31) - 1)


def return_freed_memory() -> None:
    """Hands back to the system what is free now: after a checkpoint was read, say, whose room no step will need."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


KEEPS_FREED_MEMORY = os.environ.get("KEEP_FREED_MEMORY", "1") != "0"
if KEEPS_FREED_MEMORY:
    keep_freed_memory()

# What torch's allocators say on a CPU, on CUDA and on XLA; none of them raises a MemoryError.
OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "RESOURCE_EXHAUSTED")


# What torch.load reads; it refuses to load anything where both are set.
_WEIGHTS_ONLY, _CODE_TOO = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


class CommandParser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line and suggest the nearest flag, and whose help shows defaults."""

    def __init__(self, **options):
        options.setdefault("formatter_class", argparse.ArgumentDefaultsHelpFormatter)
        options.setdefault("allow_abbrev", False)
        super().__init__(**options)

    def error(self, message: str):
        end = "" if message.endswith("?") else "."
        raise UserError(f"{message}{end} See '{self.prog} --help'.")

    def parse_args(self, args: Sequence[str] | None = None, namespace=None):
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.error(unknown_flag_message(unknown[0], [flag for a in self._actions for flag in a.option_strings]))
        return parsed


def unknown_flag_message(flag: str, valid: Sequence[str]) -> str:
    """'unknown argument --sed; did you mean --seed?'"""
    near = difflib.get_close_matches(flag.split("=")[0], valid, n=1)
    return f"unknown argument {flag}" + (f"; did you mean {near[0]}?" if near else "")


def dispatcher(package: str, description: str, commands: Mapping[str, str]) -> Callable[[Sequence[str]], int | None]:
    """A `main` that runs `PACKAGE.commands.NAME` for its first argument NAME, and prints help without one.

    Args:
        commands: {name: what it does in a few words}.
    """
    listed = "".join(f"  {name:<10} {text}\n" for name, text in commands.items())

    def dispatch(argv: Sequence[str]) -> int | None:
        if not argv or argv[0] in ("-h", "--help"):
            print(f"usage: {package} COMMAND [--help]\n\n{description}\n\ncommands:\n{listed}", end="")
            return 0
        if argv[0] not in commands:
            raise UserError(f"{unknown_flag_message(argv[0], list(commands))}. Commands are {', '.join(commands)}.")
        return importlib.import_module(f"{package}.commands.{argv[0]}").main(argv[1:])  # only what is used is imported

    return dispatch


def run_command(main: Callable[[Sequence[str]], int | None], argv: Sequence[str] | None = None) -> int:
    """Runs `main(argv)` and turns what it raises into a message on stderr and an exit code.

    UserError is the user's to mend: its text and 2. RunError, an OSError (disk full, no permission) and lack of
    memory are failures: one line and 1. Anything else is a defect of ours and keeps its traceback.
    """
    warnings.showwarning = _show_warning
    try:
        with _no_code_in_weights():
            return main(sys.argv[1:] if argv is None else argv) or 0
    except UserError as error:
        return _fail(str(error), 2)
    except RunError as error:
        return _fail(str(error), 1)
    except BrokenPipeError:  # the reader of a pipe (`| head`) has gone; nothing is wrong
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        return _fail(describe(error), 1)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(text in str(error) for text in OUT_OF_MEMORY):
            raise
        return _fail("out of memory: use a smaller batch, more accumulation steps, or shorter or smaller inputs.", 1)
    except KeyboardInterrupt:
        return _fail("interrupted.", 130)


@contextlib.contextmanager
def _no_code_in_weights() -> Iterator[None]:
    """Every torch.load is one of weights only, also those of libraries, such as torchvision's of its own networks."""
    before = {name: os.environ.pop(name, None) for name in (_WEIGHTS_ONLY, _CODE_TOO)}
    os.environ[_WEIGHTS_ONLY] = "1"
    try:
        yield
    finally:
        del os.environ[_WEIGHTS_ONLY]
        os.environ.update({name: value for name, value in before.items() if value is not None})


def _fail(message: str, code: int) -> int:
    print(_printable(f"error: {message}"), file=sys.stderr)
    return code


def _show_warning(message, category, filename, lineno, file=None, line=None) -> None:
    if issubclass(category, UserWarning):
        print(_printable(f"warning: {message}"), file=sys.stderr)


def _printable(text: str) -> str:
    """Names in files of others may hold what a terminal obeys."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)
