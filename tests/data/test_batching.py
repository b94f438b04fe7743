"""Steps and micro-batches: deterministic, complete, within the budget."""

import pytest

from fastalign.data import indices_of_step, micro_batches


def test_every_epoch_serves_each_example_once_in_a_new_order() -> None:
    steps = [indices_of_step(10, 4, step, seed=3) for step in range(5)]
    served = [index for step in steps for index in step]
    assert sorted(served[:10]) == sorted(served[10:]) == list(range(10))
    assert served[:10] != served[10:]
    assert served[:10] != list(range(10))


def test_a_step_does_not_depend_on_how_one_got_there() -> None:
    later = indices_of_step(7, 3, 4, seed=1)
    assert [indices_of_step(7, 3, step, seed=1) for step in range(5)][4] == later
    assert indices_of_step(7, 3, 4, seed=2) != later


def test_a_batch_may_be_larger_than_the_data() -> None:
    served = indices_of_step(3, 7, 0, seed=0)
    assert sorted(served[:3]) == sorted(served[3:6]) == [0, 1, 2]
    assert len(served) == 7


@pytest.mark.parametrize("budget", [1, 5, 9, 100])
def test_micro_batches_hold_every_example_within_the_budget(budget: int) -> None:
    lengths = [3, 8, 1, 5, 5, 2, 9]
    indices = [6, 0, 1, 1, 4, 3]
    batches = micro_batches(indices, lengths, tokens_per_batch=budget)
    assert sorted(i for batch in batches for i in batch) == sorted(indices)
    for batch in batches:
        assert len(batch) == 1 or sum(lengths[i] for i in batch) <= budget
    # Of lengths 9, 8, 8, 5, 5, 3 nothing pairs within 5, and within 9 only a 5 with the 3.
    assert len(batches) == {1: 6, 5: 6, 9: 5, 100: 1}[budget]


@pytest.mark.parametrize(("examples", "batch"), [(0, 1), (1, 0)])
def test_impossible_steps_are_refused(examples: int, batch: int) -> None:
    with pytest.raises(ValueError, match="expected at least 1"):
        indices_of_step(examples, batch, 0, seed=0)
