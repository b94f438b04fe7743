"""The forward whose product takes the statistics of its own results: no logits, no gradients."""

import pytest
import torch

from fastalign import fused_linear_dpo_loss, linear_logprob
from fastalign.ops import linear_kl, triton_table
from fastalign.ops.backends import unusable_reason
from fastalign.ops.head import arguments
from fastalign.ops.head.arguments import HeadOptions, check_call, epilogue_preferred
from fastalign.ops.head.buffers import EPILOGUE_BYTES, EPILOGUE_COLUMNS, EPILOGUE_ROWS, Plan
from fastalign.ops.head.call import HeadCall
from fastalign.ops.head.linear_head import LinearHead, LoraWeights
from fastalign.ops.head.linear_logprob.api import read_head
from fastalign.ops.head.linear_logprob.reference import head_logits
from fastalign.ops.triton_table import ProductConfiguration, newest, read_products
from tests.tolerance import assert_no_worse

ROWS, WIDTH, VOCABULARY, RANK = 37, 19, 101, 3  # blocks and parts of blocks, in every direction
FORMS = [
    ("plain", torch.float32),
    ("plain", torch.float16),
    ("all", torch.float32),
    ("all", torch.bfloat16),
    ("extreme", torch.float32),
]


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    reason = unusable_reason("epilogue", "cpu", torch.float32)
    if reason is not None:
        pytest.skip(reason)
    blocks = [ProductConfiguration(80, size, 16, 32, 16, 2, 4, 2, False, None) for size in (2, 4)]
    monkeypatch.setattr(triton_table, "read_products", lambda: blocks)


def make_call(
    form: str,
    dtype: torch.dtype,
    num_rows: int = ROWS,
    width: int = WIDTH,
    vocabulary: int = VOCABULARY,
) -> HeadCall:
    """A call by eager PyTorch."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    hidden, weight, bias = (
        normal(width, num_rows).t(),
        normal(vocabulary, width),
        normal(vocabulary),
    )
    targets = torch.arange(num_rows) * 11 % vocabulary
    targets[3] = -100
    head, temperature = LinearHead(weight), 1.0
    if form == "all":
        bias[7], bias[60] = -torch.inf, 90.0
        lora = LoraWeights(normal(RANK, width), normal(vocabulary, RANK), 0.5)
        head = LinearHead(weight, bias, 30.0, 0.5, lora)
        temperature = torch.linspace(0.4, 2.5, num_rows)
    elif form == "extreme":  # whole blocks are banned, and logits reach 1e4
        hidden = hidden * 1e3
        head = LinearHead(weight, bias.masked_fill(torch.arange(vocabulary) < 70, -torch.inf))
    options = HeadOptions(temperature, backend="torch")
    call = check_call("linear_logprob", hidden, head, targets, options)
    targets[20:] = head_logits(in_float64(call)).argmax(1)[20:]
    targets[5], targets[6] = vocabulary, -1  # which a CPU would refuse, and a GPU does not
    return call


def in_float64(call: HeadCall) -> HeadCall:
    wide = {
        name: value.double()
        for name, value in call._asdict().items()
        if isinstance(value, torch.Tensor) and value.is_floating_point()
    }
    return call._replace(**wide, compute_dtype=torch.float64, backend="reference")


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(("form", "dtype"), FORMS)
def test_values(form: str, dtype: torch.dtype) -> None:
    call = make_call(form, dtype)
    found, eager = read_head(call._replace(backend="epilogue")), read_head(call)
    truth = read_head(in_float64(call))
    assert bool(found[0][[5, 6]].isnan().all())
    scale = float(truth[0][truth[0].isfinite()].abs().max())
    for name, one, other, true in zip(("log-prob", "entropy"), found, eager, truth, strict=False):
        assert one.dtype == torch.float32
        assert_no_worse(name, one, other, true, dtype=torch.float32, length=VOCABULARY, scale=scale)
    assert torch.equal(found[2], eager[2])
    assert bool(found[2].any())


@pytest.mark.usefixtures("small_blocks")
def test_few_rows_at_a_time_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    high = ProductConfiguration(80, 4, 128, 64, 32, 2, 4, 2, False, None)
    monkeypatch.setattr(triton_table, "read_products", lambda: [high])
    call = make_call("plain", torch.float32, num_rows=300)
    call = call._replace(backend="epilogue", return_entropy=False)
    smallest = 256 * 2 * EPILOGUE_BYTES
    parted = call._replace(max_buffer_bytes=smallest)
    assert parted.budget(reread=False).plan(300) == Plan(256, 0, 0)
    with pytest.raises(ValueError, match=f"max_buffer_bytes: expected at least {smallest} "):
        read_head(call._replace(max_buffer_bytes=smallest - 1))
    whole, parts = read_head(call), read_head(parted)
    torch.testing.assert_close(parts, whole, rtol=1e-6, atol=1e-6, equal_nan=True)
    assert not bool(whole[1].any())  # no entropies


@pytest.mark.usefixtures("small_blocks")
def test_a_loss_without_gradients() -> None:
    call = make_call("plain", torch.float32)
    rows = (call.hidden[8:12], call.weight, call.targets[8:12], [0, 1, 2, 3, 4], torch.zeros(4))
    losses = [fused_linear_dpo_loss(*rows, backend=name)[0] for name in ("epilogue", "torch")]
    torch.testing.assert_close(*losses, rtol=1e-6, atol=0)
    assert linear_logprob(call.hidden[:0], call.weight, call.targets[:0]).shape == (0,)


@pytest.mark.usefixtures("small_blocks")
def test_what_needs_logits_is_refused() -> None:
    call = make_call("plain", torch.float32)
    hidden, weight, targets = call.hidden[8:10], call.weight, call.targets[8:10]
    with pytest.raises(ValueError, match=r"'epilogue' where gradients are wanted.*'auto'"):
        linear_logprob(hidden, weight.clone().requires_grad_(), targets, backend="epilogue")
    with pytest.raises(ValueError, match="linear_kl cannot run with 'epilogue' for two heads"):
        linear_kl(hidden, weight, hidden, weight, targets, backend="epilogue")


def test_auto_takes_it_where_it_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    call = make_call("plain", torch.float32)
    hidden, weight, targets = call.hidden[8:10], call.weight, call.targets[8:10]

    def chosen() -> str:
        return check_call(
            "linear_logprob", hidden, LinearHead(weight), targets, HeadOptions()
        ).backend

    before = chosen()
    assert before != "epilogue"
    monkeypatch.setattr(arguments, "epilogue_preferred", lambda *_: True)
    assert chosen() == "epilogue"
    weight = weight.requires_grad_()
    assert chosen() == before
    monkeypatch.undo()
    monkeypatch.setattr(triton_table, "_capability", lambda device: 90)
    gpu = torch.device("cuda")
    assert not epilogue_preferred(gpu, torch.bfloat16)
    measured = ProductConfiguration(90, 2, 128, 256, 64, 16, 8, 4, True, "a GPU")
    monkeypatch.setattr(triton_table, "read_products", lambda: [measured, *read_products()[1:]])
    assert epilogue_preferred(gpu, torch.bfloat16)
    assert not epilogue_preferred(torch.device("cpu"), torch.bfloat16)


def test_the_table_prefers_nothing_that_was_not_measured() -> None:
    for entry in read_products():
        assert entry.measured_on is not None or not entry.preferred
        assert entry.block_columns >= EPILOGUE_COLUMNS
        assert entry.block_rows <= EPILOGUE_ROWS
        assert newest([entry], 75) is entry
