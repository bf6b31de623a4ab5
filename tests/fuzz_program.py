"""Reads damaged copies of files and counts what comes of it: `python tests/fuzz_program.py SEED KIND=COUNT ...`.

Kinds are those of fuzz_readers. Prints JSON of each: {outcome: count}, the longest CPU seconds of a file, and the
growth of memory in MiB. Any outcome but content or one clear error ends it with a traceback and the number of the file,
which `KIND=FIRST:LAST` repeats; a file that takes a minute, or four GiB of address space, too.
"""

from __future__ import annotations

import faulthandler
import json
import resource
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

import fuzz_readers
import torch
from mutations import mutated_copies

HANG_SEC = 60
SPARE_BYTES = 4 << 30


def main(seed: int, ranges: dict[str, range]) -> dict[str, dict]:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    found = {}
    for kind, numbers in ranges.items():
        with tempfile.TemporaryDirectory() as folder:
            found[kind] = fuzz(kind, seed, numbers, Path(folder))
    return found


def fuzz(kind: str, seed: int, numbers: range, folder: Path) -> dict:
    read, files = fuzz_readers.KINDS[kind](folder)
    for which, data in enumerate(files):
        read(which, data)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + SPARE_BYTES, resource.RLIM_INFINITY))
    before, outcomes, longest = peak_mib(), Counter(), 0.0
    for number, which, data in mutated_copies(files, seed, numbers):
        faulthandler.dump_traceback_later(HANG_SEC, exit=True)
        started = time.process_time()
        try:
            outcomes[fuzz_readers.outcome(read, folder, which, data)] += 1
        except BaseException:
            print(f"seed {seed}, {kind}={number}:{number + 1}", file=sys.stderr)
            raise
        longest = max(longest, time.process_time() - started)
    faulthandler.cancel_dump_traceback_later()
    return {"outcomes": outcomes, "longest_sec": round(longest, 2), "grown_mib": round(peak_mib() - before)}


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def parse(word: str) -> tuple[str, range]:
    kind, numbers = word.split("=")
    return kind, range(*map(int, numbers.split(":")))


if __name__ == "__main__":
    faulthandler.enable()
    print(json.dumps(main(int(sys.argv[1]), dict(map(parse, sys.argv[2:])))))
