"""Batches of several subjects: one subject's at a time, in a seeded schedule, and each as it would come alone.

The batches of one subject are tested in test_pairs.py.
"""

import json

import numpy as np
import pytest
import tiny

from synbrain_jax.data.batches import training_batches
from synbrain_jax.errors import InputError

BATCH = 4
PER_EPOCH = (9, 5)  # of 36 and 19 trials
WIDTHS = (40, 35)


def take(iterator, count: int) -> list[dict[str, np.ndarray]]:
    return [next(iterator) for _ in range(count)]


def schedule(batches) -> list[int]:
    """Whose brain each batch is of."""
    return [WIDTHS.index(batch["fmri"].shape[1]) for batch in batches]


def assert_batches_equal(actual, expected):
    for one, other in zip(actual, expected, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


@pytest.mark.parametrize("unit", ["trial", "stimulus"])
def test_each_subjects_batches_are_those_it_has_alone(two_subjects, unit):
    settings = dict(batch_size=BATCH, unit=unit, average_share=0.5 if unit == "trial" else 0.0)
    orders = [np.random.default_rng(0).permutation(width) for width in WIDTHS]
    rng = np.random.default_rng(1)
    targets = [rng.normal(size=(n, tiny.TOKENS, tiny.WIDTH)).astype(np.float32) for n in (9, 5)]
    given = dict(orders=orders, targets=None if unit == "trial" else targets)
    batches = take(training_batches(two_subjects, "train", seed=3, **settings, **given), 40)
    whose = np.array(schedule(batches))
    for subject, dataset in enumerate(two_subjects):
        own = [batch for batch, which in zip(batches, whose, strict=True) if which == subject]
        alone = {name: each and [each[subject]] for name, each in given.items()}
        expected = training_batches([dataset], "train", seed=3 + 2 * subject, **settings, **alone)
        assert_batches_equal(own, take(expected, len(own)))


def test_subjects_take_turns_in_proportion_to_their_trials(two_subjects):
    def drawn(seed: int) -> list[int]:
        return schedule(take(training_batches(two_subjects, "train", batch_size=BATCH, seed=seed), 4 * sum(PER_EPOCH)))

    epochs = np.reshape(drawn(0), (4, sum(PER_EPOCH)))
    np.testing.assert_array_equal([np.bincount(epoch) for epoch in epochs], [PER_EPOCH] * 4)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert drawn(0) == epochs.ravel().tolist()
    assert drawn(1) != epochs.ravel().tolist()


@pytest.mark.parametrize("num_threads", [0, 2])
def test_a_restored_iterator_goes_on_with_exactly_the_next_batch(two_subjects, num_threads):
    def batches(process: int = 0):
        return training_batches(
            two_subjects,
            "train",
            batch_size=BATCH,
            seed=1,
            average_share=0.5,
            process_index=process,
            process_count=2,
            num_threads=num_threads,
        )

    iterator = batches()
    take(iterator, 11)
    state = json.dumps(iterator.get_state())
    expected = take(iterator, 20)
    assert len(set(schedule(expected))) == 2
    resumed = batches()
    resumed.set_state(json.loads(state))
    assert_batches_equal(take(resumed, 20), expected)
    colleague = batches(process=1)
    take(colleague, 11)
    assert json.dumps(colleague.get_state()) == state
    assert schedule(take(colleague, 20)) == schedule(expected)


def test_an_order_is_needed_for_each_subject(two_subjects):
    with pytest.raises(InputError, match="order: expected each of 0 to 34 once"):
        training_batches(two_subjects, "train", batch_size=BATCH, seed=0, orders=[np.arange(40)] * 2)
