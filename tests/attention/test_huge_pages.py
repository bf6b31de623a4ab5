"""Results in huge pages: tensors like any other, with fewer page faults where Linux offers them."""

import resource
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
