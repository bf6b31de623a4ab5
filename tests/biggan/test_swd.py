"""The sliced Wasserstein distance against a plain twin, and what it must and must not see."""

import numpy as np
import pytest
import torch
from scipy import ndimage
from scipy.stats import wasserstein_distance

from biggan.metrics.swd import laplacian_level, patch_descriptors, pyramid_levels, sliced_wasserstein


def textures(seed: int, count: int, resolution: int = 32) -> torch.Tensor:
    """Random images of smooth blobs with sharp edges, uint8 (count, 3, R, R)."""
    random = np.random.RandomState(seed)
    noise = ndimage.gaussian_filter(random.standard_normal((count, 3, resolution, resolution)), (0, 0, 5, 5))
    return torch.from_numpy(np.where(noise > 0, 200, 50).astype(np.uint8))


def test_pyramid_levels() -> None:
    assert pyramid_levels(64) == [64, 32, 16]
    assert pyramid_levels(16) == [16]
    for resolution in (8, 48, 100):
        with pytest.raises(ValueError, match=str(resolution)):
            pyramid_levels(resolution)


def test_laplacian_pyramid_equals_two_dimensional_filtering() -> None:
    binomial = np.outer([1, 4, 6, 4, 1], [1, 4, 6, 4, 1]) / 256

    def down(image):
        return ndimage.convolve(image, binomial, mode="mirror")[::2, ::2]

    def up(image):
        spread = np.zeros((2 * image.shape[0], 2 * image.shape[1]))
        spread[::2, ::2] = image
        return ndimage.convolve(spread, 4 * binomial, mode="mirror")

    images = textures(0, 2, 64).float()
    for level in (64, 32, 16):
        ours = laplacian_level(images, level)
        for index in np.ndindex(2, 3):
            expected = images[index].double().numpy()
            while len(expected) > level:
                expected = down(expected)
            if level > 16:
                expected = expected - up(down(expected))
            np.testing.assert_allclose(ours[index].numpy(), expected, atol=1e-3)


def test_descriptors_are_patches_normalised_by_channel() -> None:
    descriptors = patch_descriptors(textures(1, 40), 32, torch.Generator().manual_seed(0))
    assert descriptors.shape == (40 * 128, 147)
    channels = descriptors.view(-1, 3, 49).transpose(0, 1).flatten(1)
    torch.testing.assert_close(channels.mean(dim=1), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(channels.std(dim=1), torch.ones(3), atol=1e-4, rtol=0)

    # The second image is a ramp, whose patches are known up to their place: rows differ by one step, columns by none.
    images = torch.stack([torch.arange(16) * 10] * 16, dim=1).byte().expand(2, 3, 16, 16)
    patches = patch_descriptors(images, 16, torch.Generator().manual_seed(0)).view(-1, 3, 7, 7)
    steps = patches.diff(dim=2)
    torch.testing.assert_close(steps, steps[:1, :1, :1, :1].expand_as(steps), atol=1e-4, rtol=0)
    assert patches.diff(dim=3).abs().max() < 1e-6
    assert len(patches[:, 0, 0, 0].unique()) == 10  # every row a patch can start at


def test_distance_equals_its_definition() -> None:
    """The mean over directions of scipy's one-dimensional distance, with the same patches and directions."""
    real, fake = textures(2, 4, 16), textures(3, 4, 16).flip(1) // 2
    generator = torch.Generator().manual_seed(7)
    first, second = patch_descriptors(real, 16, generator), patch_descriptors(fake, 16, generator)
    directions = torch.randn(512, 147, generator=generator).double()
    directions /= directions.norm(dim=1, keepdim=True)
    distances = [
        wasserstein_distance(first.double().numpy() @ direction, second.double().numpy() @ direction)
        for direction in directions.numpy()
    ]
    ours = sliced_wasserstein(real, fake, seed=7)
    assert ours["swd_16"] == ours["swd"] == pytest.approx(1e3 * np.mean(distances), rel=1e-4)


def test_names_mean_and_determinism() -> None:
    real, fake = textures(4, 30), textures(5, 30)
    distances = sliced_wasserstein(real, fake)
    assert list(distances) == ["swd_32", "swd_16", "swd"]
    assert distances["swd"] == pytest.approx((distances["swd_32"] + distances["swd_16"]) / 2)
    assert all(type(value) is float for value in distances.values())
    assert sliced_wasserstein(real, fake) == distances
    assert sliced_wasserstein(real, fake, seed=1) != distances


def test_equal_distributions_are_near_and_others_far() -> None:
    real, other = textures(6, 200).split(100)
    floor = sliced_wasserstein(real, other)
    assert sliced_wasserstein(real, real)["swd"] < floor["swd"]
    assert floor["swd"] < sliced_wasserstein(real[:25], other[:25])["swd"]  # the floor falls with the number

    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(-40, 41, (100, 3, 32, 32), generator=generator)
    distances = sliced_wasserstein(real, (other.int() + noise).byte())
    assert distances["swd_32"] > 3 * floor["swd_32"]  # noise is seen where it is, at the finest level
    assert distances["swd_16"] < 1.5 * floor["swd_16"]


def test_images_of_one_colour_do_not_give_nan() -> None:
    grey = torch.full((4, 3, 32, 32), 128, dtype=torch.uint8)
    assert sliced_wasserstein(grey, grey) == {"swd_32": 0.0, "swd_16": 0.0, "swd": 0.0}
    assert np.isfinite(sliced_wasserstein(grey, textures(7, 4))["swd"])


def test_wrong_arguments_raise() -> None:
    images = textures(8, 4)
    with pytest.raises(ValueError, match="as many"):
        sliced_wasserstein(images, images[:3])
    with pytest.raises(ValueError, match="uint8"):
        sliced_wasserstein(images.float(), images)
    with pytest.raises(ValueError, match="got 24"):
        sliced_wasserstein(images[..., :24, :24], images[..., :24, :24])
