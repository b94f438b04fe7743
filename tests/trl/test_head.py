"""The head that our trainers attach: what it stores, what it refuses."""

import functools
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("trl")
import trl
from trl.trainer import dpo_trainer
from trl.trainer.utils import add_fused_lm_head as theirs

import fastalign.trl
from fastalign.ops import LinearHead
from fastalign.ops.head import arguments
from fastalign.trl import fused_head
from fastalign.trl.fused_head import FusedHead, TokenReader
from tests.tiny import tiny_model
from tests.trl.trl_cases import LORA, ROWS, first_batch, make_trainers, step

# TRL and what it imports warn about themselves.
pytestmark = pytest.mark.filterwarnings("ignore")


class LargestTensor(TorchDispatchMode):
    """Records the most elements of a tensor that an operation returns."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for value in found if isinstance(found, tuple | list) else (found,):
            if isinstance(value, torch.Tensor):
                self.most = max(self.most, value.numel())
        return found


@pytest.mark.parametrize("adapted", [False, True])
def test_no_logits_are_stored(adapted: bool, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # a budget of 30 rows; by default it is as many as 3,072 bytes a column hold
    monkeypatch.setattr(arguments, "default_budget", lambda columns, *_, **__: 30 * 4 * columns)
    given = {"peft_config": LORA} if adapted else {}
    options = {"precompute_ref_log_probs": True}
    pair = make_trainers("DPOTrainer", models, ROWS, options, lambda: given)
    vocabulary = pair[1].model.config.vocab_size
    most = []
    for trainer in pair:
        batch = first_batch(trainer)
        rows = int((batch["completion_mask"][:, 1:] != 0).sum())
        assert rows > 2 * 32  # so that logits are larger than the head's weight
        head = trainer.model.get_output_embeddings()
        head.register_forward_hook(lambda *_: pytest.fail("the model's own head ran"))
        with LargestTensor() as largest:
            step(trainer, batch)
        most.append(largest.most)
    assert most[1] < rows * vocabulary / 2
    assert most[0] >= rows * vocabulary  # this test sees logits


def test_rows_without_labels_give_zeros_with_a_gradient() -> None:
    hidden = torch.randn(2, 3, 8, requires_grad=True)
    head = LinearHead(torch.randn(11, 8))
    reader = TokenReader(0.5, False, frozenset(fused_head.OUTPUTS))
    labels = torch.full((2, 3), -100)
    found = reader.read(hidden, head, labels)
    assert found.keys() == {*fused_head.OUTPUTS, "label_mask"}
    found["log_probs"].sum().backward()
    assert not any(bool(value.any()) for value in (*found.values(), hidden.grad))


def test_a_head_in_float32_is_so_within_autocast() -> None:
    hidden, weight = torch.randn(1, 3, 8).bfloat16(), torch.randn(11, 8)
    labels = torch.tensor([[4, -100, 7]])
    logits = hidden.float() @ weight.T
    expected = logits.log_softmax(-1).gather(2, labels.clamp(min=0)[..., None])[..., 0]
    reader = TokenReader(1.0, True, frozenset({"log_probs"}))
    with torch.autocast("cpu", torch.bfloat16):
        found = reader.read(hidden, LinearHead(weight), labels)
    torch.testing.assert_close(found["log_probs"], expected * (labels >= 0))


def test_the_model_generates_and_scores_as_before() -> None:
    model = tiny_model("llama")
    ids = torch.tensor([[5, 6, 7]])
    before = model(ids, labels=ids).loss, model.generate(ids, max_new_tokens=3, do_sample=False)
    fused_head.add_fused_lm_head(model)
    after = model(ids, labels=ids).loss, model.generate(ids, max_new_tokens=3, do_sample=False)
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    torch.testing.assert_close(model(ids, labels=ids, fused_lm_head=True).loss, before[0])
    one = model(ids, shift_labels=ids, fused_lm_head=True).log_probs
    assert one.shape == (1, 3)


def test_trl_keeps_its_own_head(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_trainers("DPOTrainer", models, ROWS, {}, lambda: {"peft_config": LORA})
    assert dpo_trainer.add_fused_lm_head is theirs

    def refuse(model: Any) -> None:
        raise ValueError("an odd head")

    monkeypatch.setattr(fused_head, "check_head", refuse)
    with pytest.raises(ValueError, match="an odd head"):
        make_trainers("DPOTrainer", models, ROWS, {}, lambda: {"peft_config": LORA})
    assert dpo_trainer.add_fused_lm_head is theirs


def test_classes_are_found_by_name() -> None:
    assert {"FusedGRPOTrainer", "FusedDPOTrainer"} <= set(fastalign.trl.__all__)
    assert issubclass(fastalign.trl.FusedDPOTrainer, trl.DPOTrainer)
    assert fastalign.trl.FusedDPOTrainer is fastalign.trl.FusedDPOTrainer
    with pytest.raises(AttributeError, match="FusedRewardTrainer"):
        fastalign.trl.FusedRewardTrainer  # noqa: B018


def test_without_trl_its_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trl", None)
    monkeypatch.delitem(vars(fastalign.trl), "FusedSFTTrainer", raising=False)
    with pytest.raises(ValueError, match=r"pip install 'fastalign\[trl\]'"):
        fastalign.trl.FusedSFTTrainer  # noqa: B018


def test_refused_models(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="is_top1, got perplexity"):
        fused_head.add_fused_lm_head(model, outputs=("log_probs", "perplexity"))
    with monkeypatch.context() as patch:
        patch.setattr(fused_head, "is_deepspeed_zero3_enabled", lambda: True)
        with pytest.raises(ValueError, match="stage 1 or 2, got stage 3"):
            fused_head.add_fused_lm_head(model)
    with monkeypatch.context() as patch:
        patch.setattr(type(model.config), "get_text_config", lambda self: None)
        with pytest.raises(ValueError, match="of text alone, got Llama"):
            fused_head.add_fused_lm_head(model)
    model.lm_head.register_forward_hook(lambda *called: 2 * called[2])
    with pytest.raises(ValueError, match="scales or caps its logits in a way"):
        fused_head.add_fused_lm_head(model)


def test_fsdp_is_refused(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    create = trl.DPOTrainer.create_accelerator_and_postprocess

    @functools.wraps(create)
    def create_with_fsdp(self: Any) -> None:
        create(self)
        self.is_fsdp_enabled = True

    monkeypatch.setattr(trl.DPOTrainer, "create_accelerator_and_postprocess", create_with_fsdp)
    with pytest.raises(ValueError, match="fsdp: expected none"):
        make_trainers("DPOTrainer", models, ROWS, {}, lambda: {"peft_config": LORA})


class WithoutHead:
    """A trainer that attaches none, as an option of a later TRL might."""


def test_a_trl_without_such_a_head_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Fused(FusedHead, WithoutHead):
        pass

    monkeypatch.setattr(WithoutHead, "__init__", lambda self: None, raising=False)
    with pytest.raises(ValueError, match=r"expected 1\.16 or newer"):
        Fused()
    monkeypatch.setitem(globals(), fused_head.ATTACH, theirs)
    with pytest.raises(ValueError, match="Fused attached no head"):
        Fused()
