"""Orders of keys: NumPy's sort of packed integers is torch's stable argsort."""

import pytest
import torch

from attention.smyrf import sorting

SHAPES = [(7,), (3, 1000), (2, 2, 3, 257), (4, 1)]


def keys_with_ties(shape):
    """Few different numbers, among them both zeros, both infinities, and the smallest and largest that there are."""
    special = [0.0, -0.0, torch.inf, -torch.inf, 1e-45, -1e-45, 3.4e38, -3.4e38, 1.5, -1.5, 1.0000001, 1.0]
    return torch.tensor(special)[torch.randint(len(special), shape)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("draw", [torch.randn, keys_with_ties])
def test_it_is_the_stable_argsort(shape, draw):
    torch.manual_seed(0)
    keys = draw(shape)
    before = keys.clone()
    assert torch.equal(sorting._order_on_cpu(keys), keys.argsort(dim=-1, stable=True))
    assert torch.equal(keys, before)


@pytest.mark.parametrize("threads", [1, 3, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_whatever_sorts_the_order_is_the_same(threads, dtype, monkeypatch):
    monkeypatch.setattr(sorting, "THREAD_KEYS", 100)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    torch.manual_seed(0)
    keys = torch.randint(50, (8, 300)).to(dtype)
    assert torch.equal(sorting.stable_order(keys), keys.argsort(dim=-1, stable=True))


def test_without_numpy_torch_sorts(monkeypatch):
    def missing(tensor):
        raise RuntimeError("Numpy is not available")

    monkeypatch.setattr(torch.Tensor, "numpy", missing)
    keys = torch.arange(10.0).flip(0)
    assert sorting.stable_order(keys).tolist() == list(range(9, -1, -1))


def test_the_operator_is_whole():
    torch.library.opcheck(sorting._order_on_cpu, (torch.randn(2, 30),))


def test_a_strided_view_is_not_written_to():
    base = torch.randn(40, 3)
    keys, before = base.T, base.clone()
    assert torch.equal(sorting.stable_order(keys), before.T.argsort(dim=-1, stable=True))
    assert torch.equal(base, before)
