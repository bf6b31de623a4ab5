"""Batches: every example once an epoch, a function of the step alone, padded to few lengths."""

import numpy as np
import pytest

from hrrformer.batching import BatchSchedule, evaluation_batches

LENGTHS = np.random.default_rng(0).integers(1, 100, 103)
BUCKETS = (20, 50)


@pytest.mark.parametrize("buckets", [(), BUCKETS])
def test_an_epoch_has_every_example_at_most_once_and_leaves_out_the_remainder(buckets):
    schedule = BatchSchedule(LENGTHS, 8, 100, seed=0, bucket_lengths=buckets)
    assert schedule.steps_per_epoch == 12
    for epoch in (0, 1):
        drawn = np.concatenate([schedule.batch(epoch * 12 + step)[0] for step in range(12)])
        assert len(set(drawn.tolist())) == 96


def test_every_epoch_leaves_out_others_and_in_time_none():
    schedule = BatchSchedule(LENGTHS, 8, 100, seed=0, bucket_lengths=BUCKETS)
    drawn = [np.concatenate([schedule.batch(12 * epoch + step)[0] for step in range(12)]) for epoch in range(20)]
    assert len({tuple(order.tolist()) for order in drawn}) == 20
    counts = np.bincount(np.concatenate(drawn), minlength=103)
    assert counts.min() >= 15 and counts.max() == 20


@pytest.mark.parametrize("buckets", [(), BUCKETS])
def test_a_step_is_a_function_of_seed_and_step(buckets):
    forward, backward = (BatchSchedule(LENGTHS, 8, 100, seed=3, bucket_lengths=buckets) for _ in range(2))
    expected = {step: forward.batch(step) for step in range(30)}
    for step in reversed(range(30)):
        indices, length = backward.batch(step)
        assert np.array_equal(indices, expected[step][0]) and length == expected[step][1]
    other = BatchSchedule(LENGTHS, 8, 100, seed=4, bucket_lengths=buckets)
    assert any(not np.array_equal(other.batch(step)[0], expected[step][0]) for step in range(3))


def test_a_batch_is_padded_to_the_least_bucket_that_holds_it():
    schedule = BatchSchedule(LENGTHS, 8, 100, seed=0, bucket_lengths=BUCKETS)
    seen = set()
    for step in range(24):
        indices, length = schedule.batch(step)
        longest = LENGTHS[indices].max()
        assert length == min(end for end in (20, 50, 100) if end >= longest)
        seen.add(length)
    assert seen == {20, 50, 100}


def test_buckets_save_most_of_the_padding():
    flat, bucketed = (BatchSchedule(LENGTHS, 4, 100, 0, buckets) for buckets in ((), (20, 40, 60, 80)))
    tokens = [sum(schedule.batch(step)[1] for step in range(25)) for schedule in (flat, bucketed)]
    assert tokens[0] == 2500 and tokens[1] < 1700


def test_the_batches_of_an_epoch_come_in_mixed_lengths():
    schedule = BatchSchedule(LENGTHS, 4, 100, seed=0, bucket_lengths=BUCKETS)
    lengths = [schedule.batch(step)[1] for step in range(schedule.steps_per_epoch)]
    assert lengths != sorted(lengths)


def test_long_sequences_are_cut_and_pairs_count_by_the_longer():
    assert BatchSchedule(LENGTHS * 100, 8, 64, seed=0).batch(0)[1] == 64
    pairs = np.stack([LENGTHS, LENGTHS[::-1]], axis=1)
    schedule = BatchSchedule(pairs, 8, 100, seed=0, bucket_lengths=BUCKETS)
    indices, length = schedule.batch(5)
    assert length >= pairs[indices].max()


@pytest.mark.parametrize("buckets", [(), BUCKETS])
@pytest.mark.parametrize("batch_size", [7, 103, 200])
def test_evaluation_covers_each_example_once(batch_size, buckets):
    counted = []
    for indices, length, valid in evaluation_batches(LENGTHS, batch_size, 100, buckets):
        assert indices.shape == valid.shape == (batch_size,)
        assert length >= LENGTHS[indices].max()
        counted += indices[valid].tolist()
    assert sorted(counted) == list(range(103))


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="batches of 104 cannot be made of 103 examples"):
        BatchSchedule(LENGTHS, 104, 100, seed=0)
    with pytest.raises(ValueError, match=r"1 \.\. 100"):
        BatchSchedule(LENGTHS, 8, 100, seed=0, bucket_lengths=(200,))
    with pytest.raises(ValueError, match="batch_size"):
        next(evaluation_batches(LENGTHS, 0, 100))
