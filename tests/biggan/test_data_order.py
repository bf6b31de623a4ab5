"""ImageDataset: the stream of samples is a pure function of position and seed."""

import numpy as np
import pytest
import torch

from biggan.data import ImageDataset
from runtime.hashing import hash64, uniform


def numbered(count=23, resolution=4):
    """Image i has the value i in its left half and 255 - i in its right half."""
    images = torch.arange(count, dtype=torch.uint8)[:, None, None, None].repeat(1, 3, resolution, resolution)
    images[..., resolution // 2 :] = 255 - images[..., resolution // 2 :]
    return ImageDataset(images, torch.arange(count) % 5, list("abcde"))


def stream(dataset, count, batch_size, seed=0, flip=True, start=0):
    batches = [dataset.batch(at, batch_size, seed, flip) for at in range(start, start + count, batch_size)]
    return torch.cat([images for images, _ in batches])[:count], torch.cat([labels for _, labels in batches])[:count]


def test_shapes_types_and_labels_of_a_batch():
    dataset = numbered()
    images, labels = dataset.batch(0, 7, seed=1, flip=False)
    assert images.shape == (7, 3, 4, 4) and images.dtype == torch.uint8 and images.is_contiguous()
    assert labels.dtype == torch.int64
    assert torch.equal(labels, images[:, 0, 0, 0].long() % 5)
    assert (len(dataset), dataset.resolution, dataset.num_classes) == (23, 4, 5)


def test_each_epoch_is_a_new_permutation():
    dataset = numbered()
    epochs = stream(dataset, 23 * 4, 23, flip=False)[0][:, 0, 0, 0].view(4, 23)
    assert torch.equal(epochs.sort(dim=1).values, torch.arange(23, dtype=torch.uint8).expand(4, 23))
    assert len({tuple(epoch.tolist()) for epoch in epochs}) == 4
    assert not torch.equal(epochs[0], stream(dataset, 23, 23, seed=1, flip=False)[0][:, 0, 0, 0])


@pytest.mark.parametrize("batch_size", [1, 4, 10, 23, 60])
def test_the_stream_does_not_depend_on_how_it_is_cut(batch_size):
    whole = stream(numbered(), 60, 60)
    cut = stream(numbered(), 60, batch_size)
    assert torch.equal(whole[0], cut[0]) and torch.equal(whole[1], cut[1])


def test_resuming_and_dealing_to_processes_give_the_same_stream():
    whole, _ = stream(numbered(), 48, 48)
    resumed, _ = stream(numbered(), 24, 6, start=24)
    assert torch.equal(whole[24:], resumed)
    ranks = [numbered(), numbered()]
    dealt = [ranks[rank].batch(step + 4 * rank, 4, 0, True)[0] for step in range(0, 48, 8) for rank in range(2)]
    assert torch.equal(whole, torch.cat(dealt))


def test_a_batch_is_a_copy_and_equal_when_asked_again():
    dataset = numbered()
    before = dataset.images.clone()
    first, _ = dataset.batch(5, 8, 3, True)
    kept = first.clone()
    first.zero_()
    dataset.batch(400, 8, 3, True)
    assert torch.equal(dataset.batch(5, 8, 3, True)[0], kept)
    assert torch.equal(dataset.images, before)


def test_flips_mirror_half_of_the_samples_and_change_between_epochs():
    dataset = numbered()
    plain, _ = stream(dataset, 2300, 100, flip=False)
    images, _ = stream(dataset, 2300, 100, flip=True)
    flipped = (images != plain).flatten(1).any(1)
    assert torch.equal(images[flipped], plain[flipped].flip(-1))
    assert abs(flipped.double().mean() - 0.5) < 0.05  # five standard deviations
    times_flipped = torch.zeros(23).index_add_(0, plain[:, 0, 0, 0].int(), flipped.float())
    assert times_flipped.min() > 20 and times_flipped.max() < 80  # of 100 epochs, for each image


def test_the_order_is_close_to_uniform():
    dataset = numbered(8)
    place_of_image = torch.zeros(8, 8)
    for epoch in range(2000):
        order = dataset.batch(8 * epoch, 8, 0, False)[0][:, 0, 0, 0].long()
        place_of_image[torch.arange(8), order] += 1
    assert (place_of_image - 250).abs().max() < 5 * (2000 * 1 / 8 * 7 / 8) ** 0.5


def test_hash_is_the_same_everywhere_and_without_collisions():
    assert int(hash64(0)) == 0xE220A8397B1DCDAF  # first output of SplitMix64 seeded with 0
    assert len(np.unique(hash64(7, 1, np.arange(100_000)))) == 100_000
    assert int(hash64(-1)) == int(hash64(2**64 - 1))
    values = uniform(3, np.arange(100_000))
    assert values.min() >= 0 and values.max() < 1 and abs(values.mean() - 0.5) < 0.005


@pytest.mark.parametrize(
    ("images", "labels", "names"),
    [
        (torch.zeros(2, 3, 4, 4), None, None),
        (torch.zeros(2, 3, 4, 5, dtype=torch.uint8), None, None),
        (torch.zeros(2, 1, 4, 4, dtype=torch.uint8), None, None),
        (torch.zeros(0, 3, 4, 4, dtype=torch.uint8), None, None),
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64), None),
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(2), None),
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.tensor([0, 2]), ["a", "b"]),
    ],
)
def test_wrong_tensors_are_refused(images, labels, names):
    with pytest.raises(ValueError):
        ImageDataset(images, labels, names)
