"""Every implementation of shared-prefix attention: what it computes, and which one is chosen."""

import functools
import inspect
import itertools
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.varlen import varlen_attn

from fastalign.batch.packed import Group, pack
from fastalign.compute import Compute
from fastalign.models import attention
from fastalign.models.attention import choice, flex, strips, varlen
from fastalign.models.attention.blocks import MAX_PADDING, Blocks, assign_blocks
from fastalign.models.attention.rows import Gather, ranges
from fastalign.models.attention.segments import ScoreForm, row_segments
from fastalign.models.forward import response_logprob
from tests.models.attention_reference import flex_reference, varlen_reference
from tests.models.test_exactness import gradients, random_groups
from tests.tiny import tiny_model


@pytest.fixture
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPU's kernels replaced by plain code with the same arguments."""
    for name in varlen.KERNELS:
        monkeypatch.setitem(varlen.KERNELS, name, varlen_reference)
    monkeypatch.setattr(flex, "compiled_flex_attention", lambda: flex_reference)


@pytest.mark.parametrize("block_tokens", [128, 8])
@pytest.mark.parametrize("name", ["flash_attn", "varlen", "flex"])
@pytest.mark.parametrize(
    "architecture",
    ["llama", "mistral", "gemma2", "gemma3_text", "gpt2", "gpt_oss", "deepseek_v3"],
)
@pytest.mark.usefixtures("on_a_cpu")
def test_logprobs_and_gradients_are_those_of_sdpa(
    architecture: str, name: Any, block_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name != "flex" and architecture in ("gpt_oss", "deepseek_v3"):
        pytest.skip("never chosen")
    monkeypatch.setattr(flex, "BLOCK_TOKENS", block_tokens)
    model = tiny_model(architecture, dtype=torch.float64)
    batch = pack(random_groups())
    expected = response_logprob(model, batch, Compute())
    expected_gradients = gradients(model, expected)
    model.set_attn_implementation(attention.registered_name(name))
    actual = response_logprob(model, batch, Compute())
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
    for parameter, gradient in gradients(model, actual).items():
        torch.testing.assert_close(
            gradient, expected_gradients[parameter], rtol=1e-7, atol=1e-8, msg=parameter
        )


def test_the_arguments_of_torchs_kernel_are_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    @functools.wraps(varlen_attn)  # and so with its signature
    def record(*arguments: Any, **options: Any) -> torch.Tensor:
        calls.append(inspect.signature(varlen_attn).bind(*arguments, **options).arguments)
        return arguments[0]

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", record)
    rows = torch.zeros(3, 4, 8)
    keys = torch.zeros(5, 2, 8)
    for window in (None, 6):
        bounds = varlen.Bounds("cu_q", "cu_k", 3, 5)  # type: ignore[arg-type]
        varlen.torch_kernel(rows, keys, keys, bounds, ScoreForm(0.5, window))
    assert [call["window_size"] for call in calls] == [(-1, 0), (5, 0)]  # (-1, 0) is its causal
    assert all(call["scale"] == 0.5 for call in calls)
    takes_a_flag = "enable_gqa" in inspect.signature(varlen_attn).parameters
    assert all(call.get("enable_gqa") == (True if takes_a_flag else None) for call in calls)


FORMS = [ScoreForm(), ScoreForm(0.5, 6)]


def window_of(window_size: tuple[int, int], causal: bool) -> int | None:
    """What a flash kernel takes as the window of a causal attention."""
    assert causal or window_size[1] == 0
    assert window_size[1] in (-1, 0)
    return None if window_size[0] < 0 else window_size[0] + 1


def varlen_attn_2_11(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    return_aux: Any = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
) -> torch.Tensor:
    """The signature of torch 2.11, whose kernel counts grouped heads itself."""
    bounds = varlen.Bounds(cu_seq_q, cu_seq_k, max_q, max_k)
    form = ScoreForm(scale, window_of(window_size, causal=False))
    return varlen_reference(query, key, value, bounds, form)


def varlen_attn_2_15(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor | None,
    max_q: int,
    max_k: int,
    *,
    return_aux: Any = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    seqused_k: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    num_splits: int | None = None,
) -> torch.Tensor:
    """The newest signature, which refuses grouped heads unless it is told of them."""
    if not enable_gqa and query.shape[1] != key.shape[1]:
        raise ValueError("Expect query and key/value to have the same number of heads")
    assert cu_seq_k is not None
    bounds = (cu_seq_q, cu_seq_k, max_q, max_k)
    return varlen_attn_2_11(query, key, value, *bounds, scale=scale, window_size=window_size)


def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: torch.Tensor | None = None,
) -> torch.Tensor:
    """The signature of flash-attn 2.8."""
    assert causal
    assert deterministic
    bounds = varlen.Bounds(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    form = ScoreForm(softmax_scale, window_of(window_size, causal), softcap or None)
    return varlen_reference(q, k, v, bounds, form)


def flash_attn(function: Any) -> ModuleType:
    """A package in the place of flash-attn."""
    module = ModuleType("flash_attn")
    module.flash_attn_varlen_func = function  # type: ignore[attr-defined]
    return module


@pytest.mark.parametrize("heads", [(4, 2), (4, 4)], ids=str)
@pytest.mark.parametrize(
    ("stub", "form"),
    [
        *itertools.product([varlen_attn_2_11, varlen_attn_2_15, flash_attn_varlen_func], FORMS),
        (flash_attn_varlen_func, ScoreForm(softcap=3.0)),  # the others have none
    ],
)
def test_each_signature_of_a_kernel_is_met(
    stub: Any, form: ScoreForm, heads: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", stub)
    monkeypatch.setitem(sys.modules, "flash_attn", flash_attn(stub))
    name = "flash_attn" if stub is flash_attn_varlen_func else "varlen"
    plan = varlen.Varlen(row_segments(pack(random_groups()).layout), torch.device("cpu"))
    num_tokens = int(plan.bounds.queries[-1])
    query, key, value = (
        torch.randn(num_tokens, n, 8, dtype=torch.float64) for n in (heads[0], *[heads[1]] * 2)
    )
    found = plan.attend(varlen.KERNELS[name], query, key, value, form)
    assert torch.equal(found, plan.attend(varlen_reference, query, key, value, form))


@pytest.mark.parametrize("queries", [3, 128], ids=["strips of 3 queries", "one strip"])
@pytest.mark.parametrize("scores", [1, strips.STRIP_SCORES], ids=["a head", "all heads"])
@pytest.mark.parametrize("heads", [(4, 2), (3, 3)], ids=str)
@pytest.mark.parametrize(
    "form",
    [ScoreForm(), ScoreForm(0.3, 5), ScoreForm(0.3, 4, 2.0), ScoreForm(softcap=3.0)],
    ids=str,
)
def test_strips_are_the_whole_softmax(
    form: ScoreForm,
    heads: tuple[int, int],
    scores: int,
    queries: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(strips, "STRIP_QUERIES", queries)
    monkeypatch.setattr(strips, "STRIP_SCORES", scores)
    segments = row_segments(pack(random_groups()).layout)
    torch.manual_seed(0)
    rows = [
        torch.randn(segments.num_tokens, n, 8, dtype=torch.float64, requires_grad=True)
        for n in (heads[0], *[heads[1]] * 2)
    ]
    device = torch.device("cpu")
    plan = varlen.Varlen(segments, device)
    expected = plan.attend(varlen_reference, *rows, form)
    found = Blocks(segments, device).attend(*rows, form)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)
    weight = torch.randn_like(found)
    for ours, true in zip(
        *(torch.autograd.grad((weight * out).sum(), rows) for out in (found, expected)), strict=True
    ):
        torch.testing.assert_close(ours, true, rtol=1e-10, atol=1e-11)


@pytest.fixture
def empty_is_nan() -> Iterator[None]:
    """Fill memory that nothing has written yet with NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def test_keys_before_every_querys_window_get_no_gradient(empty_is_nan: None) -> None:
    segments = row_segments(pack([Group([1] * 9, [[2] * 3, [3] * 4])]).layout)
    rows = [torch.ones(segments.num_tokens, 1, 8, requires_grad=True) for _ in range(3)]
    output = Blocks(segments, torch.device("cpu")).attend(*rows, ScoreForm(window=4))
    for gradient in torch.autograd.grad(output.sum(), rows):
        assert gradient.isfinite().all()


def test_blocks_of_one_size_run_once_without_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """As much memory as all of them need: the largest strip of each size, and each one's bias."""
    monkeypatch.setattr("fastalign.models.attention.blocks.MAX_SCORES", 1)  # a block a segment
    monkeypatch.setattr(strips, "STRIP_QUERIES", 20)
    run = Mock(wraps=strips.strip_output)
    monkeypatch.setattr(strips, "strip_output", run)
    same = Group([1] * 40, [[2] * 30, [3] * 30])
    segments = row_segments(pack([same, Group([1] * 40, [[2] * 10] * 2), same]).layout)
    plan, num_tokens = Blocks(segments, torch.device("cpu")), segments.num_tokens
    with FakeTensorMode(allow_non_fake_inputs=True):
        rows = [torch.empty(num_tokens, 2, 8, dtype=torch.float64) for _ in range(3)]
        plan.attend(*rows, ScoreForm())
    sizes = [(strip.queries, strip.keys) for strip, *_ in (call.args for call in run.mock_calls)]
    assert sizes == [((20, 40), (0, 40)), ((15, 30), (0, 70)), ((0, 10), (0, 50))]
    assert [len(block.masks) for block in plan.padded.blocks] == [1] * 9


def test_bf16_strips_are_as_near_as_eager_bf16() -> None:
    groups = [Group([1] * 40, [[2] * 150, [3] * 133]), Group([4] * 200, [[5] * 90])]
    segments = row_segments(pack(groups).layout)
    plan, blocks = (kind(segments, torch.device("cpu")) for kind in (varlen.Varlen, Blocks))
    torch.manual_seed(0)
    rows = [torch.randn(segments.num_tokens, n, 16).bfloat16() for n in (4, 2, 2, 4)]

    def results(attend: Any, dtype: torch.dtype) -> list[torch.Tensor]:
        *leaves, weight = (r.to(dtype).requires_grad_() for r in rows)
        output = attend(*leaves, ScoreForm())
        return [output, *torch.autograd.grad((weight * output).sum(), leaves)]

    reference = functools.partial(plan.attend, varlen_reference)
    true = results(reference, torch.float64)
    eager, ours = results(reference, torch.bfloat16), results(blocks.attend, torch.bfloat16)
    for right, plain, found in zip(true, eager, ours, strict=True):
        assert (found - right).norm() <= 1.1 * (plain - right).norm()


def test_flex_visits_each_block_that_it_needs_and_no_other() -> None:
    segments = row_segments(pack(random_groups()).layout)
    mask = flex.Flex(segments, torch.device("cpu")).mask(None)
    place = torch.arange(segments.num_tokens)
    zero = torch.zeros((), dtype=torch.int64)
    dense = mask.mask_mod(zero, zero, place[:, None], place)
    for size in (1, 4, 128):
        num_blocks = -(-segments.num_tokens // size)
        needed = torch.zeros(num_blocks, num_blocks, dtype=torch.bool)
        for query, key in torch.nonzero(dense).tolist():
            needed[query // size, key // size] = True
        assert torch.equal(flex.visited_blocks(segments, size), needed)


def test_a_prompts_gradient_is_the_sum_of_its_copies() -> None:
    rows = torch.randn(4, 2, 3, dtype=torch.float64, requires_grad=True)
    index = torch.tensor([0, 1, 2, 0, 1, 3, 3, 0])
    copy = torch.tensor([0, 0, 0, 1, 1, 0, -1, 2])
    weight = torch.randn(8, 2, 3, dtype=torch.float64)
    gathered = Gather.from_copies(index, copy, torch.device("cpu"))(rows)
    assert torch.equal(gathered, rows[index])
    (gathered * weight).sum().backward()
    expected = torch.zeros(4, 2, 3, dtype=torch.float64)
    for place, token in enumerate(index.tolist()):
        if copy[place] >= 0:  # padding's gradient is 0, and is not read
            expected[token] += weight[place]
    torch.testing.assert_close(rows.grad, expected)


def test_a_bf16_gradient_is_rounded_once() -> None:
    rows = torch.zeros(1, 1, 1, dtype=torch.bfloat16, requires_grad=True)
    gather = Gather.from_copies(
        torch.zeros(4, dtype=torch.int64), torch.arange(4), torch.device("cpu")
    )
    parts = torch.tensor([256.0, 1.0, 1.0, 1.0], dtype=torch.bfloat16).view(4, 1, 1)
    gather(rows).backward(parts)
    assert rows.grad is not None
    assert rows.grad.item() == 260.0  # 259 rounded; added up in bf16 it stays at 256


def test_ranges() -> None:
    starts, lengths = torch.tensor([5, 0, 9, 2]), torch.tensor([2, 3, 0, 1])
    assert ranges(starts, lengths).tolist() == [5, 6, 0, 1, 2, 2]


def test_blocks_hold_everything_once_and_are_mostly_full() -> None:
    sizes = [(3 * n % 41 + 1, 5 * n % 300 + 1) for n in range(60)] + [(300, 300), (280, 300)]
    blocks = assign_blocks(sizes)
    assert sorted(number for block in blocks for number in block) == list(range(62))
    for block in blocks:
        wide, long = (max(sizes[n][side] for n in block) for side in (0, 1))
        padded = len(block) * wide * long - sum(sizes[n][0] * sizes[n][1] for n in block)
        assert padded <= (len(block) - 1) * MAX_PADDING
    assert len(blocks) < 20


def test_a_row_without_gaps_is_expected() -> None:
    batch = pack([Group([1, 2], [[3], [4, 5]]), Group([6], [[7]])])
    segments = row_segments(batch.layout)
    assert segments.start.tolist() == [0, 2, 3, 5]  # a prompt and its only response are one
    assert segments.prompt_length.tolist() == [0, 2, 2, 0]
    assert segments.number.tolist() == [0, 1, 2, 0]


GPU = torch.device("cuda", 0)
LLAMA = SimpleNamespace(model_type="llama", head_dim=64)


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A GPU of compute capability 9.0, and flash-attn."""
    monkeypatch.setitem(sys.modules, "flash_attn", flash_attn(flash_attn_varlen_func))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    return monkeypatch


def test_auto_takes_what_can_run(hopper: pytest.MonkeyPatch) -> None:
    def chosen(*needs: str, dtype: torch.dtype = torch.bfloat16) -> str:
        return choice.choose_attention("auto", GPU, dtype, LLAMA, needs)

    assert choice.choose_attention("auto", torch.device("cpu"), torch.float32, LLAMA) == "sdpa"
    assert chosen() == chosen("softcap") == "flash_attn"
    assert chosen("sinks") == chosen("value_width") == "flex"
    hopper.setitem(sys.modules, "flash_attn", None)
    assert chosen() == "varlen"
    assert chosen("softcap") == chosen(dtype=torch.float32) == "flex"
    hopper.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert chosen() == "flex"


@pytest.mark.parametrize(
    ("name", "device", "dtype", "config", "message"),
    [
        ("flash_attn", torch.device("cpu"), torch.bfloat16, LLAMA, "needs a GPU"),
        ("flex", torch.device("cpu"), torch.float32, LLAMA, "needs a GPU"),
        ("varlen", GPU, torch.float32, LLAMA, r"needs bf16 \(--train.precision bf16\)"),
        (
            "varlen",
            GPU,
            torch.bfloat16,
            SimpleNamespace(model_type="gemma2", head_dim=256),
            "no softcap, which gemma2 needs",
        ),
        (
            "flash_attn",
            GPU,
            torch.bfloat16,
            SimpleNamespace(model_type="llama", head_dim=512),
            "it needs heads of at most 256, and they are 512",
        ),
        ("flash", GPU, torch.bfloat16, LLAMA, "expected one of auto, sdpa, flash_attn"),
    ],
)
@pytest.mark.usefixtures("hopper")
def test_a_named_one_runs_or_is_refused(
    name: Any, device: torch.device, dtype: torch.dtype, config: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=f"^attention: .*{message}"):
        choice.choose_attention(name, device, dtype, config, ("softcap",))


def flash_attn_2_3(q: Any, k: Any, v: Any, *, window_size: Any = (-1, -1)) -> None:
    """Before softcaps and a deterministic backward."""


@pytest.mark.parametrize(
    ("package", "message"),
    [
        (None, r"cannot be imported \(pip install 'fastalign\[flash\]'\): import of flash_attn"),
        (ModuleType("flash_attn"), "cannot be imported .*flash_attn_varlen_func"),  # flash-attn-4
        (flash_attn(flash_attn_2_3), r"no softcap, deterministic \(pip install -U"),
    ],
    ids=["missing", "without the function", "old"],
)
def test_a_package_that_cannot_be_used_is_named(
    package: ModuleType | None, message: str, hopper: pytest.MonkeyPatch
) -> None:
    hopper.setitem(sys.modules, "flash_attn", package)
    with pytest.raises(ValueError, match=message):
        choice.choose_attention("flash_attn", GPU, torch.bfloat16, LLAMA)
    assert choice.choose_attention("auto", GPU, torch.bfloat16, LLAMA) == "varlen"
