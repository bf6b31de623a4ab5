"""What every registered mechanism must do, as a layer and, where it is one, as a function of q, k and v.

Whether a mechanism computes what its paper says is tested against its naive twin, in its own file.
"""

import math
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from attention import MultiHeadAttention, available_attention, build_attention, get_mechanism
from tests.mechanisms import OPTIONS, make_qkv
from tests.tolerance import TOLERANCE, assert_close

DIM, HEADS, MAX_LENGTH = 12, 3, 64
NAMES = list(available_attention())
FUNCTIONS = [name for name in NAMES if not get_mechanism(name).layer]


def that(test: Callable[..., bool], names: list[str] = NAMES) -> list[str]:
    return [name for name in names if test(get_mechanism(name))]


def make_layer(name: str, **options) -> MultiHeadAttention:
    torch.manual_seed(0)
    options = {"max_length": MAX_LENGTH} | OPTIONS[name] | options
    return MultiHeadAttention(DIM, HEADS, name, **options).double().eval()


def make_function(name: str, **options) -> nn.Module:
    """The mechanism for q and k (B, HEADS, N, DIM / HEADS), in float64."""
    mechanism = get_mechanism(name)
    known = {"dim": DIM, "num_heads": HEADS, "head_dim": DIM // HEADS, "max_length": MAX_LENGTH}
    known = {option: value for option, value in known.items() if option in mechanism.options}
    torch.manual_seed(0)
    return build_attention(name, **known | OPTIONS[name] | options).double().eval()


def tokens(num_tokens: int, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, num_tokens, DIM, dtype=torch.float64, generator=generator)


def run(module: nn.Module, *args: Tensor | None) -> Tensor:
    """Calls the module with the same random numbers every time, for those that draw some."""
    torch.manual_seed(2)
    return module(*args)


def refuses(name: str, support: str):
    """Expects the ValueError with the reason that the registry has."""
    return pytest.raises(ValueError, match=re.escape(str(getattr(get_mechanism(name), support))))


def test_every_mechanism_is_tested():
    assert sorted(OPTIONS) == NAMES


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("num_tokens", [16, 13, 1])
def test_shapes(name, num_tokens):
    x = tokens(num_tokens)
    out = run(make_layer(name), x)
    assert out.shape == x.shape and out.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_parameters_are_those_that_the_registry_says(name):
    projections = {"query.weight", "key.weight", "value.weight", "output.weight"}
    found = {parameter for parameter, _ in make_layer(name).named_parameters()}
    if get_mechanism(name).layer:
        assert not projections & found
    else:
        assert projections <= found
    assert bool(found - projections) == get_mechanism(name).parameters


@pytest.mark.parametrize("name", NAMES)
def test_gradients_reach_the_input_and_every_parameter(name):
    layer, x = make_layer(name), tokens(13).requires_grad_()
    run(layer, x).square().sum().backward()
    for leaf in (x, *layer.parameters()):
        assert leaf.grad.isfinite().all() and leaf.grad.abs().max() > 0


@pytest.mark.parametrize("name", that(lambda m: m.masks is True))
def test_contents_of_masked_tokens_change_no_real_token(name):
    layer, x = make_layer(name), tokens(16)
    mask = torch.zeros(2, 16, dtype=torch.bool)
    mask[0, 10:] = True
    mask[1, 3:7] = True
    outs = [run(layer, x.masked_fill(mask[..., None], filling), mask) for filling in (0.0, 9.0)]
    assert_close(*(out.masked_fill(mask[..., None], 0.0) for out in outs))
    assert outs[0][1, 7:].abs().max() > 0


@pytest.mark.parametrize("name", that(lambda m: m.masks is True))
@pytest.mark.parametrize("num_tokens", [13, 8])
def test_padding_changes_no_real_token(name, num_tokens):
    layer, x = make_layer(name), tokens(num_tokens)
    padded = torch.cat([x, tokens(7)], dim=1)
    mask = (torch.arange(num_tokens + 7) >= num_tokens).expand(2, -1)
    assert_close(run(layer, padded, mask)[:, :num_tokens], run(layer, x))


@pytest.mark.parametrize("name", that(lambda m: m.masks is True))
def test_a_mask_without_padding_changes_nothing(name):
    layer, x = make_layer(name), tokens(13)
    assert_close(run(layer, x, torch.zeros(2, 13, dtype=torch.bool)), run(layer, x))


@pytest.mark.parametrize("name", that(lambda m: m.masks is True, FUNCTIONS))
def test_wholly_masked_rows_give_zeros_and_zero_gradients(name):
    leaves = make_qkv(2, HEADS, 12, DIM // HEADS, DIM // HEADS)
    mask = torch.zeros(2, 12, dtype=torch.bool)
    mask[1] = True
    out = run(make_function(name), *leaves, mask)
    assert out[0].abs().min() > 0 and torch.equal(out[1], torch.zeros_like(out[1]))
    for grad in torch.autograd.grad(out.square().sum(), leaves):
        assert grad.isfinite().all() and torch.equal(grad[1], torch.zeros_like(grad[1])) and grad[0].abs().max() > 0


@pytest.mark.parametrize("name", that(lambda m: m.masks is True and m.layer))
def test_wholly_masked_rows_stay_finite_in_layers(name):
    layer, x = make_layer(name), tokens(12).requires_grad_()
    out = run(layer, x, torch.tensor([[False] * 12, [True] * 12]))
    out.square().sum().backward()
    assert all(y.isfinite().all() for y in (out, x.grad, *(p.grad for p in layer.parameters())))


@pytest.mark.parametrize("name", that(lambda m: m.masks is not True))
def test_masks_are_refused(name):
    with refuses(name, "masks"):
        make_layer(name)(tokens(8), torch.zeros(2, 8, dtype=torch.bool))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_zero_inputs_have_finite_outputs_and_gradients(name):
    leaves = [torch.zeros_like(x).requires_grad_() for x in make_qkv(1, HEADS, 8, DIM // HEADS, DIM // HEADS)]
    out = run(make_function(name), *leaves)
    assert out.isfinite().all()
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(out.sum(), leaves))


@pytest.mark.parametrize("name", that(lambda m: m.causal is True))
@pytest.mark.parametrize("change_at", [1, 7, 12])
def test_causal_outputs_depend_on_no_later_token(name, change_at):
    layer, x = make_layer(name, causal=True), tokens(13)
    changed = x.clone()
    changed[:, change_at:] = tokens(13)[:, change_at:].flip(1, 2) + 1.0
    before, after = run(layer, x), run(layer, changed)
    assert_close(after[:, :change_at], before[:, :change_at])
    assert ((after - before)[:, change_at:].abs().amax(dim=-1) > 1e-6).all()


@pytest.mark.parametrize("name", that(lambda m: m.causal is not True))
def test_causality_is_refused_where_there_is_none(name):
    with refuses(name, "causal"):
        make_layer(name, causal=True)
    make_layer(name, causal=False)


@pytest.mark.parametrize("name", that(lambda m: m.unequal_lengths is True))
def test_unequal_lengths(name):
    q, k, v = make_qkv(2, HEADS, 12, DIM // HEADS, DIM // HEADS)
    function = make_function(name) if name != "smyrf" else make_function(name, k_cluster_size=2)
    function.check_lengths(12, 6)
    assert run(function, q, k[:, :, :6], v[:, :, :6]).shape == q.shape


@pytest.mark.parametrize("name", that(lambda m: m.unequal_lengths is not True, FUNCTIONS))
def test_unequal_lengths_are_refused(name):
    q, k, v = make_qkv(2, HEADS, 12, DIM // HEADS, DIM // HEADS)
    with refuses(name, "unequal_lengths"):
        make_function(name)(q, k[:, :, :6], v[:, :, :6])
    with refuses(name, "unequal_lengths"):
        make_function(name).check_lengths(12, 6)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_values_of_another_size(name):
    q, k, v = make_qkv(2, HEADS, 13, DIM // HEADS, 7)
    if get_mechanism(name).value_dim is True:
        assert run(make_function(name), q, k, v).shape == v.shape
    else:
        with refuses(name, "value_dim"):
            make_function(name)(q, k, v)


@pytest.mark.parametrize("name", that(lambda m: m.any_length is not True))
def test_lengths_above_the_most_are_refused(name):
    with refuses(name, "any_length"):
        make_layer(name)(tokens(MAX_LENGTH + 1))
    with refuses(name, "any_length"):
        make_layer(name, max_length=None)
    make_layer(name)(tokens(MAX_LENGTH))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_wrong_shapes_raise(name):
    q, k, v = make_qkv(2, HEADS, 8, DIM // HEADS, DIM // HEADS)
    module = make_function(name)
    with pytest.raises(ValueError, match="must be"):
        module(q[0], k[0], v[0])
    with pytest.raises(ValueError, match="fit together"):
        module(q, k, v[:, :, :4])
    if get_mechanism(name).masks is True:
        with pytest.raises(ValueError, match="bool"):
            module(q, k, v, torch.zeros(2, 8))
        with pytest.raises(ValueError, match=r"bool \(2, 8\)"):
            module(q, k, v, torch.zeros(2, 7, dtype=torch.bool))


@pytest.mark.parametrize("name", that(lambda m: m.layer))
def test_wrong_shapes_raise_in_layers(name):
    with pytest.raises(ValueError, match=r"tokens must be \(B, N, 12\)"):
        make_layer(name)(tokens(8)[..., :6])


@pytest.mark.parametrize("name", that(lambda m: m.kind != "content"))
def test_lower_precision(name):
    """float32 rounds; bfloat16, by autocast, stays near. (Where contents choose the keys, rounding chooses others.)"""
    layer, x = make_layer(name), tokens(13)
    truth = run(layer, x)
    layer, x = layer.float(), x.float()
    assert_close(run(layer, x), truth.float(), 10 * TOLERANCE[torch.float32])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_close(run(layer, x).float(), truth.float(), 0.1)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", that(lambda m: m.kind != "content"))
def test_compiles_into_one_graph(name, backend):
    # In float32: the compiler takes the fused kernel's log-sum-exp for float32 whatever the inputs are.
    layer, x = make_layer(name).float(), tokens(13).float().requires_grad_()
    mask = None
    if get_mechanism(name).masks is True:
        mask = (torch.arange(13) >= 9).expand(2, -1)
    torch.compiler.reset()
    outs = [run(f, x, mask) for f in (layer, torch.compile(layer, fullgraph=True, backend=backend))]
    tolerance = 10 * TOLERANCE[torch.float32]
    assert_close(*outs, tolerance)
    assert_close(*(torch.autograd.grad(out.square().sum(), x)[0] for out in outs), tolerance)


GROWTH = {"N": 1.1, "N log N": 1.2, "N sqrt N": 1.5}


@pytest.mark.parametrize("name", that(lambda m: m.memory in GROWTH and m.kind != "exact"))
def test_memory_grows_as_the_registry_says(name):
    """The exponent of the peak memory, forward and backward, from 2,048 to 16,384 tokens, at the default options."""

    def peak(num_tokens: int) -> int:
        options = {}
        if name == "smyrf":
            options = {"num_hashes": 2, "q_cluster_size": 64, "k_cluster_size": 64}
        if name == "sparse":
            options = {"stride": math.isqrt(num_tokens), "num_summaries": 8}  # of the order that the paper wants
        layer = MultiHeadAttention(8, 1, name, max_length=16384, **options)
        x = torch.randn(1, num_tokens, 8, requires_grad=True)
        return peak_memory(lambda: layer(x).square().sum().backward())

    small, large = peak(2048), peak(16384)
    assert math.log(large / small, 8) <= GROWTH[get_mechanism(name).memory]


def peak_memory(function: Callable[[], None]) -> int:
    """The most bytes that torch's allocator had given out at a time while the function ran."""
    cpu = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[cpu], profile_memory=True, acc_events=False) as profile:
        function()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    total = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        total += event.nbytes()
        peak = max(peak, total)
    assert peak > 0
    return peak
