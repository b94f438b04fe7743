"""Steps and micro-batches: deterministic, complete, within the budget."""

import random
from collections import Counter

import pytest

from fastalign.batch.schedule import Mixture, indices_of_step, micro_batches, num_drawn


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


def epochs_of(mixture: Mixture, count: int, batch_size: int = 4) -> list[list[int]]:
    """The examples of each of the first epochs, as steps take them."""
    size = mixture.epoch_size
    steps = (indices_of_step(mixture, batch_size, s, seed=3) for s in range(count * size))
    served = [index for step in steps for index in step]
    return [served[epoch * size : (epoch + 1) * size] for epoch in range(count)]


def test_an_epoch_has_each_row_of_a_source_as_often_as_its_weight_says() -> None:
    mixture = Mixture((4, 6), (num_drawn(4, 3), num_drawn(6, 1)))
    for epoch in epochs_of(mixture, 3):
        assert sorted(epoch) == sorted([0, 1, 2, 3] * 3 + [4, 5, 6, 7, 8, 9])
    first, second, _ = epochs_of(mixture, 3)
    assert first != second
    # The sources are mixed: neither stands at one end of an epoch.
    assert {i < 4 for i in first[:9]} == {i < 4 for i in first[9:]} == {True, False}


@pytest.mark.parametrize(("weight", "drawn"), [(0.5, 5), (0.3, 3), (1.5, 15), (0.01, 1), (0.7, 7)])
def test_a_part_of_a_source_is_another_in_each_epoch_until_all_have_been_drawn(
    weight: float, drawn: int
) -> None:
    assert num_drawn(10, weight) == drawn
    epochs = epochs_of(Mixture((10, 2), (drawn, 2)), 10)
    of_first = [[i for i in epoch if i < 10] for epoch in epochs]
    assert all(len(epoch) == drawn for epoch in of_first)
    for end in range(1, 11):  # at any time no row was drawn twice more than another
        counts = Counter(i for epoch in of_first[:end] for i in epoch)
        times = [counts[i] for i in range(10)]
        assert max(times) - min(times) <= 1
    # In no order of the file.
    assert of_first[0] != list(range(drawn)) or drawn == 1


def test_sources_of_weight_1_are_drawn_as_one_source_and_the_order_is_that_of_before() -> None:
    plain = [indices_of_step(10, 4, step, seed=3) for step in range(10)]
    mixed = [indices_of_step(Mixture((4, 6), (4, 6)), 4, step, seed=3) for step in range(10)]
    assert plain == mixed
    order = list(range(10))
    random.Random("3/0").shuffle(order)
    assert [i for step in plain for i in step][:10] == order


def test_a_seed_orders_parts_of_a_source_differently() -> None:
    mixture = Mixture((100, 3), (10, 3))
    taken = [indices_of_step(mixture, 13, 0, seed=seed) for seed in (0, 1)]
    assert {*taken[0]} != {*taken[1]}


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


def first_fit_decreasing(sizes: list[int], budget: int) -> list[int]:
    """The loads of the batches that the textbook makes."""
    loads: list[int] = []
    for size in sorted(sizes, reverse=True):
        for number, load in enumerate(loads):
            if load + size <= budget:
                loads[number] += size
                break
        else:
            loads.append(size)
    return loads


@pytest.mark.parametrize("seed", range(60))
def test_batches_are_as_few_as_first_fit_decreasings_and_no_fuller(seed: int) -> None:
    draw = random.Random(seed)
    lengths = [draw.randint(1, draw.choice([20, 300])) for _ in range(50)]
    indices = [draw.randrange(50) for _ in range(draw.randint(1, 60))]
    budget = draw.choice([1, 7, 150, 290, 400, 100_000])
    batches = micro_batches(indices, lengths, tokens_per_batch=budget)
    assert sorted(i for batch in batches for i in batch) == sorted(indices)
    loads = [sum(lengths[i] for i in batch) for batch in batches]
    assert all(
        load <= budget or len(batch) == 1 for load, batch in zip(loads, batches, strict=True)
    )
    textbook = first_fit_decreasing([lengths[i] for i in indices], budget)
    assert len(batches) == len(textbook)
    assert max(loads) <= max(textbook)
    for batch in batches:  # the step's order is kept
        rest = iter(indices)
        assert all(i in rest for i in batch)


def test_a_step_a_little_over_the_budget_is_halved() -> None:
    lengths = [2] * 17
    batches = micro_batches(range(17), lengths, tokens_per_batch=32)
    assert sorted(len(batch) for batch in batches) == [8, 9]
    # Longest to the emptiest would overflow here: 3, 2, 2 and 3, 2. First-fit's batches stay.
    assert micro_batches(range(5), [3, 3, 2, 2, 2], tokens_per_batch=6) == [[0, 1], [2, 3, 4]]


@pytest.mark.parametrize(("examples", "batch"), [(0, 1), (1, 0)])
def test_impossible_steps_are_refused(examples: int, batch: int) -> None:
    with pytest.raises(ValueError, match="expected at least 1"):
        indices_of_step(examples, batch, 0, seed=0)
