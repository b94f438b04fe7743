"""`token_kl`: finite differences, registration, threads and wrong arguments."""

import pytest
import torch
from torch import Tensor

from fastalign.ops import token_kl
from fastalign.ops.token_kl.api import token_kl_forward
from tests.ops.test_token_kl import CASES, DIRECTIONS, NATIVE, inputs, run

FLOATS = (torch.float32, torch.float32)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_reference_gradients_by_finite_differences(direction: str) -> None:
    logits, reference = inputs((4, 6), (torch.float64, torch.float64))
    temperature = torch.tensor([0.5, 1.0, 1.5, 2.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda x: token_kl(
            x,
            reference,
            direction=direction,  # type: ignore[arg-type]
            temperature=temperature,
            softcap=3.0,
            ignored=torch.arange(4) == 2,
        ),
        logits.requires_grad_(),
    )


@pytest.mark.parametrize("name", ["reference", *([] if NATIVE else ["native"])])
@pytest.mark.parametrize("over_reference", [False, True])
def test_the_registration_passes_opcheck(name: str, over_reference: bool) -> None:
    logits, reference = inputs((5, 12), (torch.bfloat16, torch.float32))
    tensors = (logits.requires_grad_(), reference, torch.ones(5))
    for ignored in (None, torch.arange(5) == 1):
        torch.library.opcheck(token_kl_forward, (*tensors, ignored, 5.0, over_reference, name))


def test_compiled_whole() -> None:
    logits, reference = inputs((5, 12), FLOATS)

    def loss(x: Tensor) -> Tensor:
        return token_kl(x, reference, temperature=0.5, backend="reference").sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    plain, through = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    loss(plain).backward()
    compiled(through).backward()
    torch.testing.assert_close(plain.grad, through.grad)


@pytest.mark.skipif(NATIVE is not None, reason=str(NATIVE))
def test_threads_change_nothing() -> None:
    logits, reference = inputs((64, 9000), FLOATS)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 5):
            torch.set_num_threads(count)
            results.append(run(logits, reference, "native", CASES[0]))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backend": "cuda"}, "backend: expected one of 'auto'"),
        ({"direction": "both"}, "direction: expected 'reverse' or 'forward', got 'both'"),
        ({"softcap": 0.0}, "softcap: expected a positive number"),
        ({"temperature": -1.0}, "temperature: expected a positive number"),
        ({"temperature": torch.ones(3)}, r"temperature: expected a number or \(4,\)"),
        ({"ignored": torch.zeros(4)}, r"ignored: expected bool \(4,\), got torch.float32"),
        ({"ignored": torch.zeros(3, dtype=torch.bool)}, r"ignored: expected bool \(4,\)"),
        ({"logits": torch.zeros(4)}, "logits: expected a floating"),
        ({"logits": torch.zeros(4, 0)}, "logits: expected V > 0"),
        ({"reference_logits": torch.zeros(4, 6)}, r"reference_logits: expected \(4, 5\) as logits"),
        ({"reference_logits": torch.zeros(4, 5).int()}, "reference_logits: expected a floating"),
        (
            {"reference_logits": torch.zeros(4, 5, device="meta")},
            "reference_logits: expected on cpu, got meta",
        ),
    ],
)
def test_a_wrong_argument_is_named(change: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {
        "logits": torch.zeros(4, 5),
        "reference_logits": torch.zeros(4, 5),
        **change,
    }
    with pytest.raises(ValueError, match=message):
        token_kl(**arguments)  # type: ignore[arg-type]
