"""Losses with augmentation and penalties: what each is by definition, on hand numbers and against plain twins."""

import copy
from dataclasses import replace

import pytest
import torch
from test_training import batch

from biggan import penalties
from biggan.config import AugmentConfig, LossConfig
from biggan.gan import Gan
from biggan.losses import hinge_discriminator_loss, hinge_generator_loss
from biggan.objective import Objective
from runtime.device import Device


def uniforms_for(gan, config, seed=1):
    s, a = config.d_steps_per_g_step + 1, config.accumulation_steps
    shape = (s, a, config.global_batch_size // a, 2, gan.objective.numbers)
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def gan_of(config, **changes):
    torch.manual_seed(0)
    return Gan(replace(config, **changes), Device())


def test_with_everything_off_a_step_is_the_plain_one_bit_for_bit(tiny_config):
    gan = gan_of(tiny_config)
    assert gan.objective.numbers == 0 and gan.state_dict()["objective"] == {}
    plain = copy.deepcopy((gan.generator, gan.discriminator))
    images, labels, z, y, rate = batch(tiny_config)
    projections = gan.draw_projections(torch.Generator().manual_seed(0))
    gan.step(images, labels, z, y, rate, *projections)

    generator, discriminator = plain
    options = {"betas": (0.0, 0.999), "eps": 1e-6}
    adam_d, adam_g = (
        torch.optim.Adam(discriminator.parameters(), 5e-4, fused=True, **options),
        torch.optim.Adam(generator.parameters(), 2e-4, fused=True, **options),
    )

    def use(step):
        for network, directions in zip(plain, projections, strict=True):
            (stage,) = [stage for stage in network.blocks if stage.attention is not None]
            stage.attention.attention.projections = directions[step, 0]

    use(0)
    with torch.no_grad():
        fake = generator(z[0, 0], y[0, 0])
    both = torch.stack([images[0, 0].float() / 127.5 - 1, fake], 1).flatten(0, 1)
    logits = discriminator(
        both.contiguous(memory_format=torch.channels_last), torch.stack([labels[0, 0], y[0, 0]], 1).flatten()
    )
    sum(hinge_discriminator_loss(*logits.view(-1, 2).unbind(1))).backward()
    adam_d.step()
    use(1)
    discriminator.requires_grad_(False)
    hinge_generator_loss(discriminator(generator(z[1, 0], y[1, 0]), y[1, 0])).backward()
    adam_g.step()
    for ours, theirs in zip((gan.generator, gan.discriminator), plain, strict=True):
        for name, tensor in theirs.state_dict().items():
            assert torch.equal(ours.state_dict()[name], tensor), name


def test_r1_of_a_linear_discriminator_is_its_squared_weight():
    weight, images = torch.randn(3 * 8 * 8), torch.randn(5, 3, 8, 8, requires_grad=True)
    found = penalties.squared_gradients(images.flatten(1) @ weight + 2, images)
    torch.testing.assert_close(found, weight.square().sum().expand(5))


def test_the_penalties_gradient_is_that_of_finite_differences(tiny_config):
    """Through augmentation, spectral norms and SMYRF attention, for every weight along a random direction."""
    config = replace(tiny_config, loss=LossConfig(r1=1.0, r2=0.0), augment=AugmentConfig(("color", "translation")))
    gan = gan_of(config)
    gan.discriminator.double()
    (stage,) = [stage for stage in gan.discriminator.blocks if stage.attention is not None]
    torch.nn.init.constant_(stage.attention.gamma, 0.5)
    stage.attention.attention.projections = gan.draw_projections(torch.Generator().manual_seed(0))[1][0, 0].double()
    real, fake = torch.rand(2, 2, 3, 32, 32, dtype=torch.float64).unbind(0)
    classes, uniforms = torch.zeros(2, dtype=torch.int64), uniforms_for(gan, config)[0, 0, :2].double()
    with torch.no_grad():  # with distinct singular values, whose vectors, which count as constant, are exact then
        for parameter in gan.discriminator.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
        for _ in range(300):
            gan.discriminator(real[:, :, :4, :4].repeat(1, 1, 8, 8), classes)
    gan.discriminator.eval()

    def judge(x, y):
        return gan.discriminator(x, y).squeeze(1)

    def both(objective):
        return objective.discriminator_loss(judge, (real, classes), (fake, classes), uniforms)

    index = gan.objective.names.index("r1")
    adversarial = both(Objective(replace(config, loss=LossConfig()), torch.clone))[0]
    loss = both(gan.objective)[0]
    parameters = dict(gan.discriminator.named_parameters())
    gradients = torch.autograd.grad(2 * (loss - adversarial), parameters.values(), allow_unused=True)
    generator, checked = torch.Generator().manual_seed(2), 0
    for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        size, values = 1e-6, []
        for sign in (1, -2):
            parameter.data.add_(direction, alpha=sign * size)
            values.append(both(gan.objective)[1][index].item())
        parameter.data.add_(direction, alpha=size)
        slope = (values[0] - values[1]) / (2 * size)
        found = 0.0 if gradient is None else (gradient * direction).sum().item()
        assert found == pytest.approx(slope, rel=1e-4, abs=1e-5), name
        checked += abs(slope) > 1e-3
    assert checked > 10


def test_lecam_on_hand_numbers():
    real, fake = torch.tensor([1.0, 3.0]), torch.tensor([-1.0, 0.0])
    found = penalties.lecam(real, fake, mean_real=torch.tensor(2.0), mean_fake=torch.tensor(-0.5))
    torch.testing.assert_close(found, torch.tensor((1.5**2 + 3.5**2) / 2 + (3.0**2 + 2.0**2) / 2))


def losses_of(objective, discriminate, real, fake, seed=0):
    uniforms = torch.rand(len(real), 2, objective.numbers, generator=torch.Generator().manual_seed(seed))
    classes = torch.zeros(len(real), dtype=torch.int64)
    loss, values = objective.discriminator_loss(discriminate, (real, classes), (fake, classes), uniforms)
    return loss, dict(zip(objective.names, values.tolist(), strict=True))


def test_lecam_begins_after_its_start_and_is_added_with_its_strength(tiny_config):
    config = replace(tiny_config, loss=LossConfig(lecam=0.5, lecam_start_step=2), d_steps_per_g_step=2)
    objective, plain = Objective(config, torch.clone), Objective(tiny_config, torch.clone)
    real, fake = torch.rand(2, 4, 3, 8, 8)

    def discriminate(x, _):
        return x.mean((1, 2, 3))

    for step in range(6):
        loss, values = losses_of(objective, discriminate, real, fake)
        added = loss - losses_of(plain, discriminate, real, fake)[0]
        assert added == pytest.approx(0.5 * values["lecam"] if step >= 4 else 0.0, rel=1e-4, abs=1e-7)
        objective.remember({key: torch.tensor(value) for key, value in values.items()}, torch.tensor(True))


def test_consistency_is_zero_for_an_invariant_discriminator_and_only_for_one(tiny_config):
    config = replace(tiny_config, loss=LossConfig(consistency_real=3.0, consistency_fake=2.0))
    objective, plain = Objective(config, torch.clone), Objective(tiny_config, torch.clone)
    real, fake = torch.zeros(2, 4, 3, 16, 16)
    real[:, :, 4:12, 4:12], fake[:, :, 5:11, 3:13] = torch.rand(4, 3, 8, 8), torch.rand(4, 3, 6, 10)

    def invariant(x, _):
        return x.double().sum((1, 2, 3))

    def sided(x, _):
        return x.double()[..., :8].sum((1, 2, 3))

    _, values = losses_of(objective, invariant, real, fake)
    assert values["consistency_real"] < 1e-9 and values["consistency_fake"] < 1e-9
    loss, values = losses_of(objective, sided, real, fake)
    assert values["consistency_real"] > 1 and values["consistency_fake"] > 1
    added = loss - losses_of(plain, sided, real, fake)[0]
    assert added == pytest.approx(3 * values["consistency_real"] + 2 * values["consistency_fake"], rel=1e-6)


@pytest.mark.parametrize("loss, expected", [("hinge", 0.5), ("relativistic", 0.0)])
def test_the_sign_that_steers_augmentation_is_of_real_images_or_of_pairs(tiny_config, loss, expected):
    augment = AugmentConfig(("flip",), target=0.6)
    objective = Objective(replace(tiny_config, loss=LossConfig(loss), augment=augment), torch.clone)
    real, fake = (
        torch.tensor([[1.0, 2.0, 3.0, -4.0], [0.0, 1.0, 4.0, -1.0]]).view(2, 4, 1, 1, 1).expand(-1, -1, 3, 8, 8)
    )
    _, values = losses_of(objective, lambda x, _: x.mean((1, 2, 3)), real, fake)
    assert values["sign_real"] == expected


def test_both_sides_are_augmented_and_gradients_reach_the_generator(tiny_config):
    config = replace(tiny_config, augment=AugmentConfig(("translation", "cutout")))
    objective, seen = Objective(config, torch.clone), []

    def discriminate(x, _):
        seen.append(x)
        return x.square().mean((1, 2, 3))

    real, fake = torch.rand(2, 4, 3, 16, 16)
    fake.requires_grad_()
    classes, uniforms = torch.zeros(4, dtype=torch.int64), torch.rand(4, 2, objective.numbers)
    objective.discriminator_loss(discriminate, (real, classes), (fake.detach(), classes), uniforms)
    objective.generator_loss(discriminate, None, (fake, classes), uniforms).backward()
    real_seen, fake_seen = seen[0].view(4, 2, 3, 16, 16).unbind(1)
    for ours, original in ((real_seen, real), (fake_seen, fake)):
        assert all(not torch.equal(x, y) for x, y in zip(ours, original, strict=True))
    torch.testing.assert_close(seen[1], fake_seen)  # of the same numbers the same transforms
    assert fake.grad.abs().sum() > 0 and (fake.grad == 0).any()  # but where something was cut out
