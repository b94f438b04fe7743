"""docs/scaling.md holds what `python -m benchmarks.scaling` writes."""

import pytest

from benchmarks.scaling import (
    DOCUMENT,
    FEW,
    SIZES,
    activations_of,
    batch,
    peak,
    weights,
    with_tables,
)


def test_the_document_has_the_tables_as_they_are() -> None:
    document = DOCUMENT.read_text(encoding="utf-8")
    assert document.count("\n") > 90
    assert with_tables(document) == document, "run python -m benchmarks.scaling"


def test_the_sizes_are_those_of_the_models_that_they_are_named_after() -> None:
    sizes = {size: sum(w.numel() for w in weights(size, "policy").all) for size in SIZES}
    assert sizes == {"8B": 8_030_261_248, "70B": 70_553_706_496}
    assert {size: len(weights(size, "policy").layers) for size in SIZES} == {"8B": 32, "70B": 80}


@pytest.mark.parametrize("gathered", [True, False])
def test_what_is_told_from_a_few_layers_holds_for_more(
    gathered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_layers = FEW + 2
    monkeypatch.setitem(SIZES["8B"], "num_hidden_layers", num_layers)
    activations_of.cache_clear()
    told = activations_of("8B", "policy", checkpointed=True, gathered=gathered)
    found = peak("8B", "policy", num_layers, True, gathered)
    activations_of.cache_clear()
    assert batch().num_tokens == 7680
    assert 0.5 * told < found <= told
