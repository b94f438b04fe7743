"""The measurements of `benchmarks/gpu_check` run, on a CPU and on small shapes."""

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from benchmarks import heads
from benchmarks.gpu_check import (
    attention,
    head_paths,
    native,
    one_call,
    products,
    small_launches,
    versions,
)
from benchmarks.heads import HeadCase
from fastalign.ops.head.products import product_dtype

needs_bf16_products = pytest.mark.skipif(
    product_dtype(torch.bfloat16, "cpu") != torch.bfloat16,
    reason="this CPU has no product of bfloat16 that returns float32",
)


@pytest.fixture
def figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs a measurement's command on the CPU; returns the rows of its file."""

    def run(module: ModuleType, *arguments: str) -> list[dict[str, Any]]:
        path = tmp_path / "rows.json"
        command = ["measurement", "--device", "cpu", "--json", str(path), *arguments]
        monkeypatch.setattr(sys, "argv", command)
        module.main()
        rows: list[dict[str, Any]] = json.loads(path.read_text())
        return rows

    return run


@pytest.fixture
def small_case(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(heads.CASES, "llama-3-8b", HeadCase("small", 16, 8, 50, 2))


def no_triton(backend: str, device: str, dtype: torch.dtype) -> str | None:
    """Triton would be interpreted, which takes long and shows nothing here."""
    return "interpreted" if backend in ("triton", "epilogue") else None


def test_versions(figures: Any) -> None:
    first, *rest = figures(versions)
    assert first["torch"] == torch.__version__
    assert {row.get("backend") for row in rest} >= {"native", "triton"}
    assert {"attention": "sdpa", "unusable": None} in rest
    assert "needs a GPU" in next(r for r in rest if r.get("attention") == "varlen")["unusable"]


def test_a_missing_library_is_one_line_and_is_not_built(
    figures: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(native.native_library, "FOLDER", tmp_path)
    line = r"no CUDA library; carry it, or build it first: .*build_ext --inplace$"
    with pytest.raises(SystemExit, match=line) as stopped:
        figures(native)
    assert len(str(stopped.value)) <= 120  # the table of records shows no more
    assert not list(tmp_path.glob("*.so"))


@needs_bf16_products
def test_products_are_exact_and_a_wrong_one_is_named(
    figures: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "SHAPE", (16, 32, 67))
    assert len(figures(products)) == 10
    right = products.product

    def wrong(left: torch.Tensor, right_: torch.Tensor, out: torch.Tensor) -> None:
        right(left, right_, out)
        out.mul_(1.01)

    monkeypatch.setattr(products, "product", wrong)
    with pytest.raises(SystemExit, match="wrong: logits, float32, contiguous, dHidden"):
        figures(products)


@pytest.mark.usefixtures("small_case")
def test_small_launches(figures: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(small_launches, "VOCABULARIES", (1, 63))
    monkeypatch.setattr(small_launches, "unusable_reason", no_triton)
    monkeypatch.setattr(small_launches, "LENGTHS", (3, 0, 1, 21))
    rows = figures(small_launches)
    interpreted = [row["backend"] for row in rows if row.get("unusable") == "interpreted"]
    assert interpreted == ["triton", "epilogue"]
    operations = {row["operation"] for row in rows if "operation" in row}
    assert operations == {
        *("token_logprob", "token_kl", "linear_logprob", "fused_linear_dpo_loss", "linear_kl"),
        *("preference_loss", "kl_penalty", "gae"),
    }


@needs_bf16_products
@pytest.mark.usefixtures("small_case")
def test_head_paths(figures: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_paths, "unusable_reason", no_triton)
    rows = figures(
        head_paths, "--case", "llama-3-8b", "--rounds", "1", "--vocabulary", "67", "--tokens", "32"
    )
    timed = [row for row in rows if "milliseconds" in row]
    assert {row["tokens"] for row in timed} == {32}
    assert {row["vocabulary"] for row in timed} == {67}
    of_products = [row["what"] for row in timed if row["backend"] == "library"]
    assert "products, float32" in of_products
    assert "product dWeight, bfloat16" in of_products
    paths = [row["what"] for row in timed if row["backend"] == "native"]
    assert paths == [
        *("dpo, trained", "dpo, frozen", "dpo, forward"),
        *("linear_logprob, trained", "linear_logprob, frozen", "linear_logprob, forward"),
        "linear_kl, trained",
    ]


@pytest.mark.usefixtures("small_case")
def test_one_call_is_profiled(figures: Any) -> None:
    rows = figures(one_call, "--profile")
    assert all(row["microseconds"] > 0 for row in rows)
    assert rows == sorted(rows, key=lambda row: -row["microseconds"])


def test_attention_is_checked_before_it_is_timed(
    figures: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("HEADS", 4), ("KEY_HEADS", 2), ("HEAD_SIZE", 8), ("PROMPT", 12)):
        monkeypatch.setattr(attention, name, value)
    monkeypatch.setattr(attention, "RESPONSES", (7, 5))
    arguments = ("--tokens", "72", "--rounds", "1")
    sdpa, *others = figures(attention, *arguments)
    assert sdpa["tokens"] == 72
    assert sdpa["milliseconds"] > 0
    assert max(sdpa[name] for name in attention.NAMES) == 0
    assert all("needs a GPU" in row["unusable"] for row in others)
    # three groups: prompts of 12, each response sees its prompt and itself
    seen = 3 * (12 * 13 // 2 + 7 * 12 + 7 * 8 // 2 + 5 * 12 + 5 * 6 // 2)
    assert attention.attention_flops(attention.make_batch(72)) == 14 * seen * 4 * 8
    monkeypatch.setattr(attention, "AGREEMENT", -1.0)
    assert "differs" in figures(attention, *arguments)[0]["not_timed"]
