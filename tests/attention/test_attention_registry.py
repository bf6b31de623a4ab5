"""The one interface: every mechanism by name, and mistakes that name the valid choices."""

import pytest
import torch
from torch import nn

import attention
from attention import MultiHeadAttention, SpatialAttention, available_attention, build_attention

OPTIONS = {"dense": {}, "hrr": {}, "smyrf": {"num_hashes": 2, "q_cluster_size": 4, "k_cluster_size": 4}}
MECHANISMS = sorted(OPTIONS)


def qkv(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(*shape, generator=generator, dtype=dtype) for _ in range(3))


def test_available():
    assert available_attention() == MECHANISMS


@pytest.mark.parametrize("name", MECHANISMS)
@pytest.mark.parametrize("length", [16, 13])
def test_every_mechanism_stands_in_one_place(name, length):
    q, k, v = qkv(2, 3, length, 8)
    mask = torch.zeros(2, length, dtype=torch.bool)
    mask[1, 5:] = True
    module = build_attention(name, **OPTIONS[name])
    module.check_lengths(length, length)
    assert not list(module.parameters())
    assert module(q, k, v).shape == q.shape
    assert module(q, k, v, key_padding_mask=mask).shape == q.shape


@pytest.mark.parametrize("name", MECHANISMS)
def test_wholly_masked_rows_give_zeros_and_zero_gradients(name):
    leaves = [x.requires_grad_() for x in qkv(2, 2, 12, 4)]
    mask = torch.zeros(2, 12, dtype=torch.bool)
    mask[1] = True
    out = build_attention(name, **OPTIONS[name])(*leaves, mask)
    assert out[0].abs().min() > 0 and torch.equal(out[1], torch.zeros_like(out[1]))
    for grad in torch.autograd.grad(out.square().sum(), leaves):
        assert grad.isfinite().all() and torch.equal(grad[1], torch.zeros_like(grad[1])) and grad[0].abs().max() > 0


@pytest.mark.parametrize("name", MECHANISMS)
def test_masked_tokens_change_nothing(name):
    """With other contents in the masked tokens, the real ones get the same outputs."""
    q, k, v = qkv(2, 2, 16, 8)
    mask = torch.zeros(2, 16, dtype=torch.bool)
    mask[0, 10:] = True
    mask[1, 3:7] = True
    hidden = mask[:, None, :, None]
    module = build_attention(name, **OPTIONS[name])
    outs = []
    for filling in (0.0, 9.0):
        torch.manual_seed(0)
        outs.append(module(q, k.masked_fill(hidden, filling), v.masked_fill(hidden, filling), mask))
    torch.testing.assert_close(*(out.masked_fill(hidden, 0.0) for out in outs))


@pytest.mark.parametrize("name", MECHANISMS)
def test_zero_inputs_have_finite_outputs_and_gradients(name):
    leaves = [torch.zeros(1, 2, 8, 4, requires_grad=True) for _ in range(3)]
    out = build_attention(name, **OPTIONS[name])(*leaves)
    assert out.isfinite().all()
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(out.sum(), leaves))


def test_unknown_name_lists_the_names():
    with pytest.raises(ValueError, match="'dens'.*dense, hrr, smyrf"):
        build_attention("dens")


def test_misspelt_option_lists_the_options():
    with pytest.raises(TypeError, match="'cluster_size'.*num_hashes, q_cluster_size, k_cluster_size, scale"):
        build_attention("smyrf", num_hashes=2, cluster_size=4)


def test_missing_option_is_named():
    with pytest.raises(TypeError, match="needs q_cluster_size, k_cluster_size"):
        build_attention("smyrf", num_hashes=2)


def test_what_a_mechanism_cannot_do_raises():
    q, k, v = qkv(1, 1, 8, 4)
    with pytest.raises(ValueError, match="as many keys as queries"):
        build_attention("hrr")(q, k[:, :, :4], v[:, :, :4])
    with pytest.raises(ValueError, match="as many keys as queries"):
        build_attention("hrr").check_lengths(8, 4)
    with pytest.raises(ValueError, match="keys' head size"):
        build_attention("hrr")(q, k, v[..., :2])


@pytest.mark.parametrize("name", MECHANISMS)
def test_wrong_shapes_raise(name):
    q, k, v = qkv(2, 2, 8, 4)
    module = build_attention(name, **OPTIONS[name])
    with pytest.raises(ValueError, match="must be"):
        module(q[0], k[0], v[0])
    with pytest.raises(ValueError, match="fit together"):
        module(q, k, v[:, :, :4])
    with pytest.raises(ValueError, match="bool"):
        module(q, k, v, torch.zeros(2, 8))
    with pytest.raises(ValueError, match=r"bool \(2, 8\)"):
        module(q, k, v, torch.zeros(2, 7, dtype=torch.bool))


@pytest.mark.parametrize("name", MECHANISMS)
def test_multi_head(name):
    torch.manual_seed(0)
    layer = MultiHeadAttention(12, 3, name, **OPTIONS[name])
    x = torch.randn(2, 9, 12)
    assert layer(x).shape == x.shape
    assert sorted(dict(layer.named_parameters())) == ["key.weight", "output.weight", "query.weight", "value.weight"]


def test_multi_head_needs_a_divisor():
    with pytest.raises(ValueError, match="multiple of num_heads"):
        MultiHeadAttention(10, 3)


def test_multi_head_equals_torch():
    """The dense layer computes what torch.nn.MultiheadAttention computes with the same weights."""
    torch.manual_seed(0)
    ours, theirs = MultiHeadAttention(8, 2, "dense"), nn.MultiheadAttention(8, 2, bias=False, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([ours.query.weight, ours.key.weight, ours.value.weight]))
        theirs.out_proj.weight.copy_(ours.output.weight)
    x, mask = torch.randn(2, 5, 8), torch.tensor([[False] * 5, [False, False, True, True, False]])
    torch.testing.assert_close(ours(x, mask), theirs(x, x, x, mask)[0])


SPATIAL = {"dense": {}, "smyrf": {"num_hashes": 2, "q_cluster_size": 16, "k_cluster_size": 4}}


@pytest.mark.parametrize("name", sorted(SPATIAL))
def test_spatial_starts_as_the_identity_and_trains(name):
    torch.manual_seed(0)
    block = SpatialAttention(16, name, **SPATIAL[name])
    x = torch.randn(2, 16, 8, 8)
    assert torch.equal(block(x), x)
    block(x).square().sum().backward()
    assert block.gamma.shape == () and block.gamma.grad != 0


def test_spatial_equals_its_definition():
    torch.manual_seed(0)
    block = SpatialAttention(16, "dense")
    block.gamma.data.fill_(0.7)
    x = torch.randn(2, 16, 4, 6)
    theta, phi, g = (conv(x) for conv in (block.theta, block.phi, block.g))
    phi, g = (nn.functional.max_pool2d(y, 2).reshape(2, -1, 6) for y in (phi, g))
    weights = torch.softmax(theta.reshape(2, 2, 24).transpose(1, 2) @ phi, dim=-1)  # (B, HW, HW/4), scale 1
    out = (g @ weights.transpose(1, 2)).reshape(2, 8, 4, 6)
    torch.testing.assert_close(block(x), 0.7 * block.o(out) + x)


def test_spatial_mechanisms_share_parameters():
    dense, smyrf = SpatialAttention(16, "dense"), SpatialAttention(16, "smyrf", **SPATIAL["smyrf"])
    smyrf.load_state_dict(dense.state_dict())
    assert list(dense.state_dict()) == ["gamma", "theta.weight", "phi.weight", "g.weight", "o.weight"]


def test_spatial_takes_a_convolution():
    made = []

    def conv(in_channels, out_channels):
        made.append((in_channels, out_channels))
        return nn.Conv2d(in_channels, out_channels, 1, bias=False)

    SpatialAttention(16, "dense", conv)
    assert made == [(16, 2), (16, 2), (16, 8), (8, 16)]


def test_spatial_refuses_what_cannot_work():
    with pytest.raises(ValueError, match="multiple of 8"):
        SpatialAttention(12, "dense")
    with pytest.raises(ValueError, match="cannot stand"):
        SpatialAttention(16, "hrr")
    with pytest.raises(TypeError, match="num_hash"):
        SpatialAttention(16, "smyrf", num_hash=3)
    with pytest.raises(ValueError, match="even height and width, not 5x4"):
        SpatialAttention(16, "dense")(torch.randn(1, 16, 5, 4))
    block = SpatialAttention(16, "smyrf", num_hashes=1, q_cluster_size=16, k_cluster_size=16)
    with pytest.raises(ValueError, match="16 clusters.*4;"):
        block.check_resolution(16)
    with pytest.raises(ValueError, match="even"):
        block.check_resolution(7)
    block.check_resolution(4)


def test_public_names_exist():
    assert all(hasattr(attention, name) for name in attention.__all__)
