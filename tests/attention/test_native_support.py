"""Scratch memory of the kernels in C."""

from concurrent.futures import ThreadPoolExecutor

import torch

from attention import HRRSelfAttention
from attention.native_support import KEPT_BYTES, scratch_memory


def test_a_thread_keeps_its_own():
    first = scratch_memory(1000)
    assert len(first) >= 1000
    assert scratch_memory(10) is first
    with ThreadPoolExecutor(1) as other:
        assert other.submit(scratch_memory, 10).result().data_ptr() != first.data_ptr()
    larger = scratch_memory(len(first) + 1)
    assert larger is not first and scratch_memory(10) is larger


def test_much_is_not_kept():
    kept = scratch_memory(1)
    assert scratch_memory(KEPT_BYTES // 4 + 1).nbytes > KEPT_BYTES
    assert scratch_memory(1) is kept


def test_layers_in_several_threads():
    layer = HRRSelfAttention(32, 4)
    inputs = torch.randn(4, 2, 144, 32)

    def run(x):
        with torch.no_grad():
            return [layer(x) for _ in range(20)]

    expected = [run(x)[0] for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        for outs, out in zip(pool.map(run, inputs), expected, strict=True):
            assert all(torch.equal(o, out) for o in outs)
