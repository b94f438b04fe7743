"""`gae`: every backend against a loop in float64."""

import pytest
import torch
from torch import Tensor

from fastalign.ops import gae
from fastalign.ops.gae import triton_kernels
from fastalign.ops.gae.op import gae_forward
from fastalign.ops.native_library import unusable_reason
from tests.ops.packed_cases import (
    BACKENDS,
    LENGTHS,
    bounds_of,
    normal,
    order_of,
    poison_new_tensors,
    require,
)
from tests.tolerance import assert_no_worse

NUMBERS = [(1.0, 0.95), (1.0, 1.0), (0.999, 1.0), (0.9, 0.7), (1.0, 0.0), (0.0, 0.5)]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    require(request.param)
    monkeypatch.setattr(triton_kernels, "MAX_BLOCK", 32)  # so that a block follows another
    return request.param


def inputs(lengths: list[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Reward, value, bounds and bootstrap value."""
    num_tokens = sum(lengths)
    return (
        normal(num_tokens, 1),
        normal(num_tokens, 2),
        bounds_of(lengths),
        normal(len(lengths), 3),
    )


def loop(
    reward: Tensor, value: Tensor, bounds: Tensor, bootstrap: Tensor | None, g: float, lam: float
) -> tuple[Tensor, Tensor]:
    """The lines in the docstring, in double."""
    rewards, values, bound = reward.tolist(), value.tolist(), bounds.tolist()
    advantages = [0.0] * len(rewards)
    for response in range(len(bound) - 1):
        following = 0.0 if bootstrap is None else float(bootstrap[response])
        advantage = 0.0
        for t in reversed(range(bound[response], bound[response + 1])):
            delta = rewards[t] + g * following - values[t]
            advantage = advantages[t] = delta + g * lam * advantage
            following = values[t]
    truth = torch.tensor(advantages, dtype=torch.float64)
    return truth, truth + value.double()


def assert_rounded_once(name: str, found: Tensor, truth: Tensor) -> None:
    """Half a unit in the last place, and a hair for the doubles' own rounding."""
    allowed = truth.abs() * torch.finfo(torch.float32).eps / 2 + 1e-9
    assert found.dtype == torch.float32
    worst = (found.double() - truth).abs() - allowed
    assert not bool((worst > 0).any()), (name, float(worst.max()))


@pytest.mark.parametrize("numbers", NUMBERS, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_values(backend: str, lengths: list[int], numbers: tuple[float, float]) -> None:
    reward, value, bounds, bootstrap = inputs(lengths)
    options = dict(zip(("gamma", "gae_lambda"), numbers, strict=True))
    for following in (None, bootstrap):
        found = gae(reward, value, bounds, bootstrap_value=following, backend=backend, **options)
        truth = loop(reward, value, bounds, following, *numbers)
        for name, ours, true in zip(("advantage", "returns"), found, truth, strict=True):
            longest = max(lengths, default=1)
            best = true.float()
            assert_no_worse(name, ours, best, true, dtype=torch.float32, length=longest, scale=3.0)
            if backend != "reference":
                assert_rounded_once(name, ours, true)


@pytest.mark.parametrize("numbers", NUMBERS[:3], ids=str)
def test_ten_thousand_tokens(numbers: tuple[float, float]) -> None:
    require("native")
    reward, value, bounds, bootstrap = inputs([10_000, 1, 4_999])
    gamma, lam = numbers
    found = gae(
        reward,
        value,
        bounds,
        gamma=gamma,
        gae_lambda=lam,
        bootstrap_value=bootstrap,
        backend="native",
    )
    truth = loop(reward, value, bounds, bootstrap, gamma, lam)
    for name, ours, true in zip(("advantage", "returns"), found, truth, strict=True):
        assert_rounded_once(name, ours, true)


def test_by_hand(backend: str) -> None:
    reward = torch.tensor([-0.01, 0.02, -0.03, 1.0])
    value = torch.tensor([0.1, 0.2, 0.15, 0.3])
    advantage, returns = gae(reward, value, torch.tensor([0, 4]), backend=backend)
    expected = torch.tensor([0.7699625, 0.71575, 0.785, 0.7])
    torch.testing.assert_close(advantage, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(returns, expected + value, rtol=0, atol=1e-6)


def test_float64_is_the_references() -> None:
    reward, value, bounds, bootstrap = inputs([30, 0, 2])
    arguments = (reward.double(), value.double(), bounds)
    found = gae(*arguments, gamma=0.9, gae_lambda=0.8, bootstrap_value=bootstrap)
    truth = loop(reward, value, bounds, bootstrap, 0.9, 0.8)
    for ours, true in zip(found, truth, strict=True):
        torch.testing.assert_close(ours, true, rtol=0, atol=1e-13)


def test_with_lambda_one_the_returns_are_the_rewards_to_come(backend: str) -> None:
    reward, value, _, _ = inputs([40])
    _, returns = gae(reward, value, torch.tensor([0, 40]), gae_lambda=1.0, backend=backend)
    to_come = reward.flip(0).double().cumsum(0).flip(0).float()
    torch.testing.assert_close(returns, to_come, rtol=0, atol=1e-5)


def test_the_order_of_responses_is_of_no_consequence(backend: str) -> None:
    lengths = [3, 0, 50, 7]
    reward, value, bounds, bootstrap = inputs(lengths)
    reversed_lengths, order = order_of(lengths)
    first = gae(reward, value, bounds, bootstrap_value=bootstrap, backend=backend)
    second = gae(
        reward[order],
        value[order],
        bounds_of(reversed_lengths),
        bootstrap_value=bootstrap.flip(0),
        backend=backend,
    )
    assert all(torch.equal(a[order], b) for a, b in zip(first, second, strict=True))


def test_a_nan_reaches_the_tokens_before_it_in_its_response(backend: str) -> None:
    reward, value, bounds, _ = inputs([4, 40, 3])
    reward[4 + 35] = torch.nan
    advantage, returns = gae(reward, value, bounds, backend=backend)
    expected = [4 <= t <= 4 + 35 for t in range(47)]
    assert advantage.isnan().tolist() == returns.isnan().tolist() == expected


def test_tensors_may_be_strided_and_of_other_dtypes(backend: str) -> None:
    lengths = [9, 40]
    reward, value, bounds, bootstrap = inputs(lengths)
    reward, value = reward.bfloat16(), value.half()
    plain = gae(reward.float(), value.float(), bounds, bootstrap_value=bootstrap, backend=backend)
    strided = gae(
        torch.stack([reward, reward], 1)[:, 0],
        torch.stack([value, value], 1)[:, 1],
        torch.stack([bounds, bounds], 1).int()[:, 0],
        bootstrap_value=torch.stack([bootstrap, bootstrap], 1)[:, 0],
        backend=backend,
    )
    assert all(torch.equal(a, b) for a, b in zip(plain, strided, strict=True))


def test_uninitialised_memory_is_never_read(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reward, value, bounds, _ = inputs([5, 0, 40])
    before = gae(reward, value, bounds, backend=backend)
    poison_new_tensors(monkeypatch)
    after = gae(reward, value, bounds, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_no_gradient_flows(backend: str) -> None:
    reward, value, bounds, bootstrap = inputs([5])
    leaves = [tensor.requires_grad_() for tensor in (reward, value)]
    results = gae(*leaves, bounds, bootstrap_value=bootstrap.requires_grad_(), backend=backend)
    assert not any(result.requires_grad for result in results)


@pytest.mark.parametrize("name", BACKENDS)
def test_the_registration_passes_opcheck(name: str) -> None:
    require(name)
    reward, value, bounds, bootstrap = inputs([3, 0, 4])
    torch.library.opcheck(gae_forward, (reward, value, bounds, bootstrap, 0.9, 0.8, name))


def test_compiled_whole() -> None:
    reward, value, bounds, bootstrap = inputs([3, 0, 4])

    def estimate(reward: Tensor, value: Tensor) -> Tensor:
        return gae(reward, value, bounds, bootstrap_value=bootstrap, backend="reference")[0]

    compiled = torch.compile(estimate, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(reward, value), estimate(reward, value))


@pytest.mark.skipif(unusable_reason("cpu") is not None, reason=str(unusable_reason("cpu")))
def test_threads_change_nothing() -> None:
    reward, value, bounds, _ = inputs([100_000, 3, 50_000, 80_000])
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append(gae(reward, value, bounds, backend="native"))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reward": torch.zeros(5, dtype=torch.int64)}, r"reward: expected floating \(N,\)"),
        ({"reward": torch.zeros(5, 1)}, r"reward: expected floating \(N,\).*\(5, 1\)"),
        ({"value": torch.zeros(4)}, r"value: expected floating \(5,\), got torch.float32 \(4,\)"),
        ({"bounds": torch.tensor([0, 6])}, r"bounds: expected to rise from 0 to 5, got 0\.\.6"),
        ({"bounds": torch.tensor([0, 3, 2, 5])}, "bounds: .* from 0 to 5, got 3, 2 at segment 1"),
        ({"bounds": [0, 3, 5]}, r"bounds: expected a tensor \(R \+ 1,\), got list"),
        ({"bounds": torch.tensor([0.0, 5.0])}, r"bounds: expected integers \(R \+ 1,\)"),
        ({"bootstrap_value": torch.zeros(3)}, r"bootstrap_value: expected floating \(2,\)"),
        ({"value": torch.zeros(5, device="meta")}, "value: expected on cpu as reward is, got meta"),
        ({"gamma": 1.01}, r"gamma: expected a number in \[0, 1\], got 1.01"),
        ({"gamma": float("nan")}, "gamma: expected"),
        ({"gae_lambda": -0.1}, r"gae_lambda: expected a number in \[0, 1\], got -0.1"),
        ({"backend": "numpy"}, "backend: expected one of 'auto'"),
    ],
)
def test_a_wrong_argument_is_named(change: dict[str, object], message: str) -> None:
    arguments = {
        "reward": torch.zeros(5),
        "value": torch.zeros(5),
        "bounds": torch.tensor([0, 2, 5]),
    }
    with pytest.raises(ValueError, match=message):
        gae(**{**arguments, **change})  # type: ignore[arg-type]
