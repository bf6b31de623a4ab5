"""Every transform does what its paper says to every image by itself, and carries gradients."""

import math

import pytest
import torch

from biggan.augmentation import (
    POLICIES,
    Augmentation,
    brightness,
    contrast,
    cutout,
    flip,
    rotation,
    saturation,
    scale,
    shift,
    translation,
)

ALL = tuple(POLICIES)


@pytest.fixture
def images():
    return torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


def numbers(count, *shape, seed=1):
    return torch.rand(*shape, count, generator=torch.Generator().manual_seed(seed))


def test_brightness_shifts_all_pixels_of_an_image_equally(images):
    change = brightness(images, torch.linspace(0, 0.99, 6)[:, None]) - images
    expected = (torch.linspace(0, 0.99, 6) - 0.5).view(-1, 1, 1, 1).expand_as(images)
    torch.testing.assert_close(change, expected)


def test_saturation_and_contrast_scale_the_distance_from_grey_and_from_the_mean(images):
    u = numbers(1, 6)
    for transform, dims, factor in ((saturation, 1, 2 * u), (contrast, (1, 2, 3), u + 0.5)):
        mean, out = images.mean(dims, keepdim=True), transform(images, u)
        torch.testing.assert_close(out.mean(dims, keepdim=True), mean)
        torch.testing.assert_close(out - mean, (images - mean) * factor.view(-1, 1, 1, 1))


def test_shift_is_pure_and_zeros_come_in(images):
    out = shift(images[:2], torch.tensor([[2, -3], [0, 0]]))
    assert torch.equal(out[0, :, 2:, :-3], images[0, :, :-2, 3:])
    assert (out[0, :, :2] == 0).all() and (out[0, :, :, -3:] == 0).all()
    assert torch.equal(out[1], images[1])


def test_translation_reaches_an_eighth_each_way_and_all_between_equally():
    u = torch.arange(500).view(-1, 1) / 500
    row = torch.zeros(500, 3, 16, 16)
    row[:, :, 8] = 1
    found = translation(row, torch.cat([u, torch.full_like(u, 0.5)], dim=1)).sum(dim=(1, 3)).argmax(dim=1)
    assert found.bincount(minlength=16).tolist() == [0] * 6 + [100] * 5 + [0] * 5


def test_cutout_is_exactly_a_square_of_half_the_side(images):
    places = torch.tensor([[8.0, 8], [4, 12], [0, 16]]) / 17 + 1e-4  # centres of the square, 17 of them each way
    out = cutout(torch.ones(3, 3, 16, 16), places)
    assert (out[0, :, 4:12, 4:12] == 0).all() and (out[0] == 0).sum() == 3 * 64
    assert (out[1, :, :8, 8:] == 0).all() and (out[1] == 0).sum() == 3 * 64
    assert (out[2, :, :4, -4:] == 0).all() and (out[2] == 0).sum() == 3 * 16  # three quarters lie outside
    kept = cutout(images, numbers(2, 6))
    assert torch.equal(kept[kept != 0], images[kept != 0])


def test_flip_and_rotation_move_whole_pixels(images):
    u = torch.tensor([[0.1], [0.3], [0.4], [0.6], [0.8], [0.9]])
    assert torch.equal(flip(images, u), torch.cat([images[:3].flip(3), images[3:]]))
    for i, quarters in enumerate((0, 1, 1, 2, 3, 3)):
        assert torch.equal(rotation(images, u)[i], images[i].rot90(quarters, (1, 2)))


def test_scale_is_log_normal_and_about_the_centre():
    ramp = torch.arange(64.0).view(1, 1, 1, -1).expand(2000, 1, 64, 64) - 31.5
    out = scale(ramp, numbers(2, 2000))
    torch.testing.assert_close(out[..., 31] + out[..., 32], torch.zeros(2000, 1, 64), rtol=0, atol=1e-3)
    exponents = -(out[:, 0, 0, 33] - out[:, 0, 0, 32]).log2()
    assert abs(exponents.mean()) < 0.02 and abs(exponents.std() - 0.2) < 0.02
    same = torch.tensor([[0.3, 0.25]])  # cos(pi / 2) = 0
    torch.testing.assert_close(scale(ramp[:1], same), ramp[:1], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ALL)
def test_gradients_and_their_gradients(name):
    augmentation = Augmentation([name])
    images = torch.rand(2, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    uniforms = numbers(augmentation.numbers, 2).double()
    arguments = images.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: augmentation(x, uniforms, 1.0), arguments)
    assert torch.autograd.gradgradcheck(lambda x: augmentation(x, uniforms, 1.0).tanh(), arguments)


def test_each_image_has_its_own_numbers_and_depends_on_no_other(images):
    augmentation = Augmentation(ALL)
    uniforms = numbers(augmentation.numbers, 6)
    whole = augmentation(images, uniforms, 1.0)
    alone = torch.cat([augmentation(images[i : i + 1], uniforms[i : i + 1], 1.0) for i in range(6)])
    torch.testing.assert_close(whole, alone)
    same = augmentation(images[:1].expand(6, -1, -1, -1), uniforms, 1.0)
    assert all(not torch.equal(same[i], same[j]) for i in range(6) for j in range(i))


@pytest.mark.parametrize("probability", [0.0, torch.tensor(0.0)])
def test_probability_zero_is_the_identity_bit_for_bit(images, probability):
    augmentation = Augmentation(ALL)
    assert torch.equal(augmentation(images, numbers(augmentation.numbers, 6), probability), images)


def test_the_probability_is_that_of_each_transform_alone():
    images, augmentation = torch.ones(4000, 3, 8, 8), Augmentation(["cutout", "color"])
    # Of white images only cutout makes something black, and without it only brightness changes anything.
    out = augmentation(images, numbers(augmentation.numbers, 4000), torch.tensor(0.3))
    several = (out[:, :1].flatten(1) != out[:, :1, :1, :1].flatten(1)).any(dim=1)
    bound = 4 * math.sqrt(0.3 * 0.7 / 4000)
    assert abs(several.float().mean() - 0.3) < bound
    assert abs((out[~several] != 1).flatten(1).any(dim=1).float().mean() - 0.3) < 1.2 * bound


@pytest.mark.parametrize("policy", [["colour"], ["color", "color"]])
def test_a_wrong_policy_is_refused(policy):
    with pytest.raises(ValueError, match="augmentation"):
        Augmentation(policy)
