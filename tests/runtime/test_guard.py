"""Updates that are not finite are not applied, and everything about the first of them can be read later."""

import math

import pytest
import torch

from runtime.device import Device
from runtime.guard import Guard, gradient_norms, step_where


def network_with_gradients(value=1.0):
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1))
    for i, parameter in enumerate(network.parameters()):
        parameter.grad = torch.full_like(parameter, value + i)
    return network


def state_of(network, optimizer):
    moments = [x.clone() for p in network.parameters() for x in optimizer.state[p].values()]
    return [p.detach().clone() for p in network.parameters()], moments


def test_the_first_bad_update_is_remembered_and_all_later_ones_are_refused():
    guard = Guard({"d": ["loss_d", "gradient of a"], "g": ["loss_g"]}, torch.clone)
    for _ in range(2):
        assert guard.check("d", torch.tensor([1.0, 2.0])) and guard.check("g", torch.tensor([3.0]))
        guard.end_step()
    before = guard.reader()
    assert guard.check("d", torch.tensor([4.0, 5.0])) and not guard.check("g", torch.tensor([math.inf]))
    guard.end_step()
    assert not guard.check("d", torch.tensor([math.nan, 1.0])) and not guard.check("g", torch.tensor([1.0]))
    guard.end_step()
    assert before() is None  # what was read then
    found = guard.reader()()
    assert found.steps == 2 and found.values == {"loss_g": math.inf}  # not what came later
    guard.reset()
    assert guard.reader()() is None and guard.check("g", torch.tensor([1.0]))


def test_gradient_norms_go_by_parameter():
    network = network_with_gradients()
    network[0].bias.grad = None
    expected = [0.0 if p.grad is None else p.grad.norm().item() for p in network.parameters()]
    assert gradient_norms(network).tolist() == pytest.approx(expected) and expected[1] == 0


@pytest.mark.parametrize("options", [{}, {"capturable": False, "amsgrad": True}])
@pytest.mark.parametrize("steps_before", [0, 2])
def test_the_update_that_a_compiled_step_leaves_out_leaves_no_trace(options, steps_before):
    """`step_where` is what cuda and xla do; here the healthy updates are those of the optimizer alone."""
    networks = [network_with_gradients() for _ in range(2)]
    optimizers = [torch.optim.Adam(network.parameters(), **options) for network in networks]
    for _ in range(steps_before):
        optimizers[0].step()
        step_where(torch.tensor(True), optimizers[1])
    for p in networks[1].parameters():
        p.grad = torch.full_like(p, math.nan)
    step_where(torch.tensor(False), optimizers[1])
    if not steps_before:  # moments as they are before a first step
        for p in networks[1].parameters():
            assert all(not x.any() for x in optimizers[1].state[p].values())
    for p, healthy in zip(networks[1].parameters(), networks[0].parameters(), strict=True):
        p.grad = healthy.grad.clone()
    optimizers[0].step()
    step_where(torch.tensor(True), optimizers[1])
    for first, second in zip(state_of(networks[0], optimizers[0]), state_of(networks[1], optimizers[1]), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def test_a_cpu_takes_no_update_that_is_not_healthy():
    network = network_with_gradients()
    optimizer, before = torch.optim.Adam(network.parameters()), [p.detach().clone() for p in network.parameters()]
    Device().update(optimizer, torch.tensor(False))
    assert all(torch.equal(p, x) for p, x in zip(network.parameters(), before, strict=True)) and not optimizer.state
    Device().update(optimizer, torch.tensor(True))
    assert not any(torch.equal(p, x) for p, x in zip(network.parameters(), before, strict=True))
