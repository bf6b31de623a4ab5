"""The one interface: every mechanism by name, and mistakes that name the valid choices."""

import pytest
import torch
from torch import nn

import attention
from attention import MultiHeadAttention, SpatialAttention, available_attention, build_attention, get_mechanism
from attention.registry import register
from attention.spatial import can_stand
from tests.mechanisms import OPTIONS


def test_available_is_a_list_that_prints_as_a_table():
    names = available_attention()
    assert names == sorted(names) and {"dense", "hrr", "smyrf"} <= set(names)
    table = str(names).splitlines()
    assert len(table) == len(names) + 1 and table[0].startswith("name") and "causal" in table[0]
    assert table[1].split()[0] == names[0]


def test_an_entry_must_agree_with_its_constructor():
    """Nothing that registers can offer what its options do not have, or hide what they have."""

    class Option(nn.Module):
        def __init__(self, causal: bool = False) -> None: ...

    with pytest.raises(ValueError, match="disagree about 'causal'"):
        register("new", unequal_lengths=True, value_dim=True)(Option)
    with pytest.raises(ValueError, match="disagree about 'max_length'"):
        register("new", unequal_lengths=True, value_dim=True, causal=True, any_length="it has rows")(Option)
    with pytest.raises(ValueError, match="'dense' is already registered"):
        register("dense", unequal_lengths=True, value_dim=True, causal=True)(Option)
    assert "new" not in available_attention()


def test_unknown_name_lists_the_names():
    with pytest.raises(ValueError, match="'dens'.*dense, .*hrr, .*smyrf"):
        build_attention("dens")


def test_misspelt_option_lists_the_options():
    with pytest.raises(TypeError, match="'cluster_size'.*num_hashes, q_cluster_size, k_cluster_size, scale"):
        build_attention("smyrf", num_hashes=2, cluster_size=4)


def test_missing_option_is_named():
    with pytest.raises(TypeError, match="needs q_cluster_size, k_cluster_size"):
        build_attention("smyrf", num_hashes=2)


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


STANDING = [name for name in available_attention() if can_stand(get_mechanism(name))]


def make_block(name, **options):
    """SpatialAttention on 16 channels for maps of up to 8 x 8."""
    options = OPTIONS[name] | {"smyrf": {"q_cluster_size": 16, "k_cluster_size": 4}}.get(name, {}) | options
    if get_mechanism(name).any_length is not True:
        options["max_length"] = 64
    return SpatialAttention(16, name, **options)


@pytest.mark.parametrize("name", STANDING)
def test_spatial_starts_as_the_identity_and_trains(name):
    torch.manual_seed(0)
    block = make_block(name)
    block.check_resolution(8)
    x = torch.randn(2, 16, 8, 8)
    assert torch.equal(block(x), x)
    block(x).square().sum().backward()
    assert block.gamma.shape == () and block.gamma.grad != 0


@pytest.mark.parametrize("name", sorted(set(available_attention()) - set(STANDING)))
def test_spatial_refuses_what_cannot_stand_there(name):
    with pytest.raises(ValueError, match="cannot stand.*: .*dense, .*smyrf"):
        SpatialAttention(16, name)


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
    dense, smyrf = SpatialAttention(16, "dense"), make_block("smyrf")
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
