"""The arithmetic of a head's designs: an 8B model's head on an H200, other shapes and chips."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks.paper import CHIPS, DESIGNS, Chip, Shape, main, predict

LLAMA = Shape(4096, 4096, 128256)


def ratio(name: str) -> float:
    return predict(name, LLAMA, CHIPS["h200"]).ratio_to_products


def test_an_8b_models_head_on_an_h200() -> None:
    assert ratio("before A1") == pytest.approx(1.27, abs=0.005)
    assert ratio("A1") == pytest.approx(1.09, abs=0.005)
    assert ratio("A2") <= 1.06
    assert ratio("frozen, one read") == pytest.approx(1.08, abs=0.005)
    assert ratio("forward") == pytest.approx(1.10, abs=0.005)
    assert ratio("forward, two streams") == pytest.approx(1.06, abs=0.005)
    assert ratio("forward, L2 strips") > ratio("forward")
    assert ratio("forward, epilogue 95 %") == pytest.approx(1.055, abs=0.002)
    assert ratio("forward, epilogue 91 %") == pytest.approx(ratio("forward"), abs=0.005)
    held = DESIGNS["forward, epilogue 95 %"](LLAMA).peak_bytes
    assert held == 2 * 4 * 4096 * 501  # blocks of 256 columns
    assert 1.02 < ratio("A3, best") < ratio("QuACK, published") < ratio("A3, worst") < 1.06
    products = predict("A1", LLAMA, CHIPS["h200"])
    assert products.flops == 6 * 4096 * 4096 * 128256
    assert products.milliseconds - sum(products.steps_milliseconds.values()) == pytest.approx(
        17.33, abs=0.01
    )


def test_the_steps_of_the_present_design() -> None:
    logits, rows, weight = 4096 * 128256, 4096 * 4096, 4096 * 128256
    steps = {step.name: step.num_bytes for step in DESIGNS["A1"](LLAMA).steps}
    assert steps == {
        "tile pass, 2 read(s)": 10 * logits,
        "float32 Jacobian": 2 * rows,
        "Jacobian times coefficients": 10 * rows,
        "rows times coefficients": 8 * rows,
    }
    # two chunks by the plan: a float32 sum, written and added to once, then multiplied and rounded
    twice = {step.name: step.num_bytes for step in DESIGNS["A1"](Shape(8192, 4096, 128256)).steps}
    assert twice["sum of dWeight over chunks"] == (2 + 8) * weight
    assert twice["dWeight times upstream, cast"] == 6 * weight
    master = Shape(8192, 4096, 128256, torch.float32)
    wide = {step.name: step.num_bytes for step in DESIGNS["A1"](master).steps}
    assert wide["weight in the products' dtype"] == 6 * weight
    assert wide["sum of dWeight over chunks"] == 8 * weight
    assert wide["dWeight times upstream, cast"] == 8 * weight


def test_a_slower_memory_costs_and_slower_products_hide_it() -> None:
    h200 = CHIPS["h200"]
    for name in DESIGNS:
        found = predict(name, LLAMA, h200)
        slow_memory = predict(name, LLAMA, Chip(h200.products, h200.copy / 2))
        slow_products = predict(name, LLAMA, Chip(h200.products / 2, h200.copy))
        assert slow_memory.milliseconds > found.milliseconds
        assert (
            slow_products.ratio_to_products < found.ratio_to_products
            or DESIGNS[name](LLAMA).slower_products
        )


def test_the_command_prints_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "paper.json"
    main(
        [
            "--shape",
            "4096",
            "576",
            "49152",
            "--chip",
            "a100",
            "--tflops",
            "250",
            "--json",
            str(path),
        ]
    )
    rows = json.loads(path.read_text())
    assert [row["design"] for row in rows] == list(DESIGNS)
    printed = capsys.readouterr().out
    for row in rows:
        assert f"{row['milliseconds']:.2f}" in printed
    bare = 1e3 * 2 * 4096 * 576 * 49152 / 250e12
    assert rows[1]["milliseconds"] / rows[1]["ratio_to_products"] == pytest.approx(3 * bare)
