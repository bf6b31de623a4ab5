"""The generator and the discriminator: shapes, options, errors, precision and the exchange of mechanisms."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from attention import SpatialAttention
from biggan.architectures import GENERATOR_WIDTHS, discriminator_blocks, generator_blocks
from biggan.discriminator import Discriminator
from biggan.generator import Generator

SMYRF = {"num_hashes": 2, "q_cluster_size": 64, "k_cluster_size": 16}
SMALL = {"resolution": 32, "channels": 8, "num_classes": 3, "attention_resolutions": (16,), "attention": "dense"}
HIERARCHICAL = {"shared_dim": 8, "hierarchical": True, "dim_z": 40}
NETWORKS = pytest.mark.parametrize("network", [Generator, Discriminator])


@pytest.mark.parametrize("resolution", GENERATOR_WIDTHS)
def test_every_resolution_makes_images_and_logits(resolution):
    options = {"resolution": resolution, "channels": 1, "attention_resolutions": (), "attention": "dense"}
    generator, discriminator = Generator(**options, dim_z=5).eval(), Discriminator(**options).eval()
    y = torch.zeros(1, dtype=torch.int64)
    with torch.no_grad():
        images = generator(torch.randn(1, 5), y)
        logits = discriminator(images, y)
    assert images.shape == (1, 3, resolution, resolution) and images.abs().max() <= 1
    assert logits.shape == (1, 1)


def test_resolutions_of_the_blocks():
    assert [spec.resolution for spec in generator_blocks(64, 1, ())] == [8, 16, 32, 64]
    assert [spec.resolution for spec in discriminator_blocks(32, 1, ())] == [16, 8, 8, 8]
    assert [spec.resolution for spec in discriminator_blocks(64, 1, ())] == [32, 16, 8, 4, 4]


@pytest.mark.parametrize(
    ("network", "resolution", "attention_resolutions", "expected"),
    [(Generator, 32, (16, 32), [1, 2]), (Discriminator, 32, (16, 8), [0, 1, 2, 3]), (Discriminator, 64, [16], [1])],
)
def test_attention_stands_where_it_is_asked_for(network, resolution, attention_resolutions, expected):
    options = {"resolution": resolution, "channels": 8, "attention": "dense"}
    model = network(**options, attention_resolutions=attention_resolutions)
    assert [i for i, stage in enumerate(model.blocks) if stage.attention is not None] == expected
    assert all(stage.attention is None or stage.attention.gamma == 0 for stage in model.blocks)


@NETWORKS
def test_weights_do_not_depend_on_the_mechanism(network):
    dense = network(**SMALL)
    smyrf = network(**SMALL | {"attention": "smyrf", "attention_options": SMYRF})
    assert {k: v.shape for k, v in dense.state_dict().items()} == {k: v.shape for k, v in smyrf.state_dict().items()}
    smyrf.load_state_dict(dense.state_dict())


def test_smyrf_with_one_cluster_is_dense():
    torch.manual_seed(0)
    dense = Generator(**SMALL).eval()
    one_cluster = {"num_hashes": 1, "q_cluster_size": 256, "k_cluster_size": 64}
    smyrf = Generator(**SMALL | {"attention": "smyrf", "attention_options": one_cluster}).eval()
    dense.blocks[1].attention.gamma.data.fill_(0.7)
    smyrf.load_state_dict(dense.state_dict())
    z, y = torch.randn(2, dense.dim_z), torch.tensor([0, 2])
    with torch.no_grad():
        out = dense(z, y)
        torch.testing.assert_close(smyrf(z, y), out, rtol=0, atol=1e-5)
        dense.blocks[1].attention.gamma.zero_()
        assert (dense(z, y) - out).abs().max() > 1e-3


def test_hierarchical_z_is_rounded_down_and_reaches_every_block():
    generator = Generator(**SMALL | HIERARCHICAL | {"dim_z": 43}).eval()
    assert generator.dim_z == 40
    z = torch.randn(1, 40, requires_grad=True)
    generator(z, torch.tensor([1])).square().sum().backward()
    assert (z.grad.unflatten(1, (4, 10)).abs().amax(2) > 0).all()


@pytest.mark.parametrize("options", [{}, HIERARCHICAL])
def test_forward_is_embed_then_synthesize_and_depends_on_the_class(options):
    generator = Generator(**SMALL | options).eval()
    z, y = torch.randn(2, generator.dim_z), torch.tensor([0, 2])
    out = generator(z, y)
    assert torch.equal(out, generator.synthesize(z, generator.embed(y)))
    assert not torch.allclose(out, generator(z, torch.tensor([1, 1])))


def test_discriminator_depends_on_the_class():
    discriminator = Discriminator(**SMALL).eval()
    x = torch.randn(2, 3, 32, 32)
    assert not torch.allclose(discriminator(x, torch.tensor([0, 1])), discriminator(x, torch.tensor([2, 2])))


@NETWORKS
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"resolution": 96}, ValueError, "32, 64, 128, 256, 512, 1024"),
        ({"attention_resolutions": (12,)}, ValueError, "12.*8, 16"),
        ({"attention": "sparse"}, ValueError, "dense.*smyrf"),
        ({"attention": "hrr"}, ValueError, "smyrf"),
        ({"attention_options": {"num_hash": 2}}, TypeError, "num_hash"),
        ({"attention": "smyrf", "attention_options": SMYRF | {"k_cluster_size": 4}}, ValueError, "cluster"),
        ({"attn_resolutions": (16,)}, TypeError, "attn_resolutions"),
    ],
)
def test_wrong_options_raise(network, options, error, message):
    with pytest.raises(error, match=message):
        network(**SMALL | options)


def test_attention_at_the_image_resolution_is_for_generators_only():
    Generator(**SMALL | {"attention_resolutions": (32,)})
    with pytest.raises(ValueError, match="the discriminator of 32 pixels has maps of 8, 16"):
        Discriminator(**SMALL | {"attention_resolutions": (32,)})


@pytest.mark.parametrize(
    ("options", "message"), [({"hierarchical": True}, "shared_dim"), (HIERARCHICAL | {"dim_z": 3}, "at least 4")]
)
def test_impossible_z_raises(options, message):
    with pytest.raises(ValueError, match=message):
        Generator(**SMALL | options)


def test_z_of_another_length_raises():
    with pytest.raises(ValueError, match="39 components, the generator takes 40"):
        Generator(**SMALL | HIERARCHICAL)(torch.randn(1, 39), torch.tensor([0]))


def both(generator: nn.Module, discriminator: nn.Module, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    y = torch.arange(len(z)) % 3
    images = generator(z, y)
    return images, discriminator(images, y)


def test_channels_last_stays_and_changes_nothing():
    torch.manual_seed(0)
    networks = Generator(**SMALL | HIERARCHICAL), Discriminator(**SMALL)
    for network in networks:
        for module in network.modules():
            if isinstance(module, SpatialAttention):
                module.gamma.data.fill_(0.5)
    z = torch.randn(2, 40)
    last = [copy.deepcopy(network).to(memory_format=torch.channels_last) for network in networks]
    layouts = []

    def note_layout(stage, inputs, output):
        layouts.append(output.is_contiguous(memory_format=torch.channels_last))

    for network in last:
        for stage in network.blocks:
            stage.register_forward_hook(note_layout)
    for ours, expected in zip(both(*last, z), both(*networks, z), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-4)
    assert layouts and all(layouts)


def test_autocast_gives_float32_outputs_and_gradients():
    torch.manual_seed(0)
    generator, discriminator = Generator(**SMALL | HIERARCHICAL).eval(), Discriminator(**SMALL).eval()
    z = torch.randn(2, 40)
    expected = both(generator, discriminator, z)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = both(generator, discriminator, z)
    for out, reference in zip(outputs, expected, strict=True):
        assert out.dtype == torch.float32
        torch.testing.assert_close(out, reference, rtol=0, atol=0.05 * reference.abs().max().item())
    outputs[1].sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in generator.parameters())
