"""The packed row: every index, by hand."""

import pytest

from fastalign.batch.packed import Group, pack

GROUPS = [Group([1, 10, 11], [[20, 2], [30, 31, 2]]), Group([1], [[40, 2]])]


def test_a_row_by_hand() -> None:
    batch = pack(GROUPS)
    assert batch.input_ids.tolist() == [1, 10, 11, 20, 2, 30, 31, 2, 1, 40, 2]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 4, 3, 4, 5, 0, 1, 2]
    assert batch.layout.prompt_bounds == ((0, 3), (8, 9))
    assert batch.response_bounds.tolist() == [[3, 5], [5, 8], [9, 11]]
    assert batch.layout.response_prompt == (0, 0, 1)
    assert batch.predict_index.tolist() == [2, 3, 2, 5, 6, 8, 9]
    assert batch.targets.tolist() == [20, 2, 30, 31, 2, 40, 2]
    assert batch.target_bounds.tolist() == [0, 2, 5, 7]
    assert (batch.num_tokens, batch.num_targets) == (11, 7)


def test_prompts_are_repeated_when_not_shared() -> None:
    shared, repeated = pack(GROUPS), pack(GROUPS, share_prompts=False)
    assert repeated.num_tokens == shared.num_tokens + 3
    assert repeated.targets.tolist() == shared.targets.tolist()
    assert repeated.target_bounds.tolist() == shared.target_bounds.tolist()
    assert repeated.layout.response_prompt == (0, 1, 2)


def test_masked_tokens_are_not_predicted() -> None:
    batch = pack([Group([1, 5], [[6, 7, 8]], [[True, False, True]])])
    assert batch.targets.tolist() == [6, 8]
    assert batch.predict_index.tolist() == [1, 3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], [[1]]), "prompt of at least one token"),
        (([1], []), "at least one response"),
        (([1], [[1], []]), "response 1 has no token"),
        (([1], [[1, 2]], [[True]]), "response_loss_mask has lengths"),
    ],
)
def test_a_bad_group_is_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Group(*arguments)


def test_an_empty_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one group"):
        pack([])
