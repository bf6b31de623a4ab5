"""Results in huge pages: tensors like any other, with fewer page faults where Linux offers them; none once kept."""

import os
import platform
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from attention.huge_pages import new_result

SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
offered = SETTING.exists() and "[never]" not in SETTING.read_text()


@pytest.mark.parametrize("shape", [(), (0, 4), (3, 5), (1000, 1100)], ids=str)
@pytest.mark.parametrize("dtype", [None, torch.float64])
def test_is_a_new_tensor(shape, dtype):
    like = torch.empty(2, dtype=torch.float16)
    result = new_result(like, *shape, dtype=dtype)
    assert result.shape == shape and result.dtype == (dtype or like.dtype) and result.is_contiguous()
    assert (result.fill_(2) == 2).all()


def test_other_devices():
    assert new_result(torch.empty(0, device="meta"), 1 << 20).shape == (1 << 20,)


@pytest.mark.skipif(not offered, reason="no huge pages here")
def test_fewer_page_faults():
    result = new_result(torch.empty(0), 1 << 24)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    result.zero_()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 64 * 2**20 // 4096 // 2


ROUNDS = """
import ctypes, resource, sys
from attention.huge_pages import keep_freed_results
if sys.argv[1] == "kept":
    keep_freed_results()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
blocks = [0] * 4
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for i in range(4):
        blocks[i] = libc.malloc(1 << 22)
        libc.memset(blocks[i], 1, 1 << 22)
    for i in range(4):
        libc.free(blocks[i])
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(mode: str) -> int:
    environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    run = subprocess.run(
        [sys.executable, "-c", ROUNDS, mode], check=True, capture_output=True, text=True, env=environment
    )
    return int(run.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_results_are_kept():
    assert faults("kept") < 100 < faults("as it is")
