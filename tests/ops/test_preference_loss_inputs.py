"""`preference_loss`: wrong arguments, threads and instruction sets."""

import pytest
import torch

from fastalign.losses import dpo
from fastalign.ops import preference_loss
from tests.ops.preference_loss_cases import inputs, make, run
from tests.ops.test_preference_loss import NATIVE


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logprob": torch.zeros(2, 6)}, r"logprob: expected float32 or float64 \(N,\)"),
        ({"logprob": torch.zeros(12).bfloat16()}, "logprob: expected .*, got torch.bfloat16"),
        ({"bounds": torch.zeros(5)}, r"bounds: expected integers \(R \+ 1,\), got torch.float32"),
        ({"bounds": torch.tensor([0, 2, 5, 7, 11])}, r"bounds: expected to rise from 0 to 12"),
        ({"bounds": torch.tensor([0, 5, 2, 7, 12])}, r"bounds: expected to rise from 0 to 12"),
        ({"bounds": torch.tensor([0, 2, 7, 12])}, r"bounds: expected 2B \+ 1, .* got 4"),
        ({"reference_logprob": None}, "reference_logprob: expected one, for this loss needs it"),
        ({"reference_logprob": torch.zeros(2)}, r"reference_logprob: expected floating \(4,\)"),
        ({"reference_logprob": torch.zeros(4).int()}, r"reference_logprob: .* got torch.int32"),
        ({"length": torch.zeros(4)}, r"length: expected integer \(4,\), got torch.float32"),
        ({"length": torch.ones(2).long()}, r"length: expected integer \(4,\).* \(2,\)"),
        ({"tie": torch.zeros(2).int()}, r"tie: expected bool \(2,\), got torch.int32"),
        ({"tie": torch.zeros(4).bool()}, r"tie: expected bool \(2,\).* \(4,\)"),
        ({"tie": torch.zeros(2, device="meta").bool()}, "tie: expected on cpu .*, got meta"),
        ({"formula": make("simpo")}, "reference_logprob: expected None, for simpo has no ref"),
        ({"formula": dpo}, r"formula: expected one of fastalign.losses.formula, .*<function dpo"),
        ({"formula": make("dpo")}, "tie: expected None, for dpo has no ties, got a tensor"),
        ({"backend": "cuda"}, "backend: expected one of 'auto'"),
        ({"logprob": torch.zeros(12).double(), "backend": "triton"}, "it computes in float32"),
    ],
)
def test_a_wrong_argument_is_named(change: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {
        "logprob": torch.zeros(12),
        "bounds": torch.tensor([0, 2, 5, 7, 12]),
        "formula": make("dpo_rao_kupper"),
        "reference_logprob": torch.zeros(4),
        "tie": torch.zeros(2).bool(),
        **change,
    }
    with pytest.raises(ValueError, match=message):
        preference_loss(**arguments)  # type: ignore[arg-type]


@pytest.mark.skipif(NATIVE is not None, reason=str(NATIVE))
def test_threads_change_nothing() -> None:
    pairs = inputs("dpo", list(range(0, 401_000, 10_000)))
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 5):
            torch.set_num_threads(count)
            results.append(run("dpo", pairs, "native"))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.skipif(NATIVE is not None, reason=str(NATIVE))
def test_an_instruction_set_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTALIGN_CPU_ISA", "portable")
    pairs = inputs("dpo", [0, 2, 5])
    assert run("dpo", pairs, "native")[0].isfinite().all()
    monkeypatch.setenv("FASTALIGN_CPU_ISA", "sse")
    with pytest.raises(ValueError, match="FASTALIGN_CPU_ISA: expected one of"):
        run("dpo", pairs, "native")
