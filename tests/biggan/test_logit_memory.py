"""What a step remembers of logits: means on hand numbers, and a probability that goes where its paper sends it."""

import pytest
import torch

from biggan.logit_memory import AdaptiveProbability, LogitMeans

HEALTHY, ILL = torch.tensor(True), torch.tensor(False)


def put(tensor):
    return tensor.clone()


def test_means_of_logits_copy_then_average():
    means = LogitMeans(decay=0.9, put=put)
    means.update(torch.tensor(2.0), torch.tensor(-1.0), HEALTHY)
    assert means.state == {"mean_real": 2, "mean_fake": -1, "updates": 1}
    means.update(torch.tensor(3.0), torch.tensor(-2.0), HEALTHY)
    assert means.state["mean_real"] == pytest.approx(2.1) and means.state["mean_fake"] == pytest.approx(-1.1)


def adapted(signs, batch=64, kimg=500.0, limit=1.0):
    memory = AdaptiveProbability(target=0.6, speed=batch / (1000 * kimg), limit=limit, put=put)
    for sign in signs:
        memory.update(torch.tensor(sign), HEALTHY)
    return memory


def test_the_probability_goes_from_0_to_1_in_500_000_images():
    """Where the discriminator is sure of all real images; every fourth batch moves it."""
    quarter = 500_000 // 64 // 4
    assert adapted([1.0] * quarter).probability == pytest.approx(0.25, rel=1e-2)
    steps = [float(adapted([1.0] * n).probability) for n in range(9)]
    assert steps == pytest.approx([0] * 4 + [256 / 500_000] * 4 + [512 / 500_000])


def test_it_falls_where_the_mean_sign_of_four_batches_is_below_the_target():
    assert adapted([1.0] * 40 + [0.5] * 20).probability == pytest.approx(5 * 256 / 500_000)
    assert adapted([1.0, 1.0, 1.0, -0.5] * 3).probability == pytest.approx(3 * 256 / 500_000)  # their mean is 0.625
    assert adapted([1.0, 1.0, 1.0, -0.7] * 3).probability == 0
    assert adapted([1.0] * 8, kimg=0.064, limit=0.8).probability == pytest.approx(0.8)


@pytest.mark.parametrize("memory", [adapted([1.0] * 6), LogitMeans(0.9, put)])
def test_an_update_that_was_not_applied_leaves_no_trace(memory):
    before = memory.state_dict()
    arguments = (torch.tensor(torch.nan),) * (1 if isinstance(memory, AdaptiveProbability) else 2)
    for _ in range(5):
        memory.update(*arguments, ILL)
    assert memory.state_dict() == before


def test_the_state_comes_back():
    first, second = adapted([1.0] * 6), adapted([])
    second.load_state_dict(first.state_dict())
    for memory in (first, second):
        memory.update(torch.tensor(1.0), HEALTHY)
        memory.update(torch.tensor(0.5), HEALTHY)
    assert first.state_dict() == second.state_dict() and first.probability > 256 / 500_000
    second.load_state_dict({})
    assert second.state_dict() == adapted([]).state_dict()
