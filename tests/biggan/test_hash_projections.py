"""Hash directions from the host: of the right shape, in the place of the mechanism's own, and gone afterwards."""

from dataclasses import replace

import pytest
import torch

from biggan.config import AttentionConfig
from biggan.gan import Gan, build_generator
from biggan.hash_projections import draw_projections, use_projections
from runtime.device import Device


@pytest.mark.parametrize("hashing", ["e2lsh", "voronoi", "cross-polytope"])
def test_given_directions_decide_alone(tiny_config, hashing):
    torch.manual_seed(0)
    attention = replace(tiny_config.attention, options=tiny_config.attention.options | {"hashing": hashing})
    generator = build_generator(replace(tiny_config, attention=attention)).eval()
    with torch.no_grad():
        generator.blocks[1].attention.gamma.fill_(5.0)
    z, y = torch.randn(2, 8, generator=torch.Generator().manual_seed(0)), torch.zeros(2, dtype=torch.int64)

    def images(seed):
        use_projections(generator, draw_projections(generator, (), torch.Generator().manual_seed(seed)))
        return generator(z, y)

    first = images(1)
    torch.rand(7)  # the default generator has no part in it
    assert torch.equal(first, images(1)) and not torch.equal(first, images(2))
    use_projections(generator, [])  # two draws of its own may cluster alike; eight do not
    assert len({generator(z, y).detach().numpy().tobytes() for _ in range(8)}) > 1


def test_a_step_has_directions_for_each_call_and_keeps_none(tiny_config):
    config = replace(
        tiny_config,
        d_steps_per_g_step=2,
        accumulation_steps=2,
        attention=replace(tiny_config.attention, generator_resolutions=(16, 32)),
    )
    gan = Gan(config, Device())
    projections = gan.draw_projections(torch.Generator().manual_seed(0))
    assert [tuple(p.shape[:2]) for p in projections] == [(3, 2)] * 3  # two in the generator, one in the discriminator
    assert all(mechanism.projections is None for mechanism in mechanisms(gan))
    images = torch.zeros(2, 2, 2, 3, 32, 32, dtype=torch.uint8)
    y = torch.zeros(3, 2, 2, dtype=torch.int64)
    gan.step(images, y[:2], torch.randn(3, 2, 2, 8), y, torch.tensor(0.1), *projections)
    assert all(mechanism.projections is None for mechanism in mechanisms(gan))


def mechanisms(gan):
    stages = [*gan.generator.blocks, *gan.discriminator.blocks]
    return [stage.attention.attention for stage in stages if stage.attention is not None]


def test_other_mechanisms_take_none(tiny_config):
    generator = build_generator(replace(tiny_config, attention=AttentionConfig("dense", (16,), (16,))))
    assert draw_projections(generator, (3,), torch.Generator()) == []
    use_projections(generator, [])
