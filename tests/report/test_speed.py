"""Speed, memory, gradients and useful work: the numbers, and what real runs leave for them."""

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from fastalign.cli.main import main
from fastalign.report.charts import MOST_BINS, sections, thinned
from fastalign.report.metric_table import MetricTable
from fastalign.report.page import render
from fastalign.report.pictures import static_chart
from fastalign.report.runs import RunRecord, num_product_weights, read_run
from fastalign.report.speed import (
    PEAKS,
    SPEED_COLUMNS,
    model_flops_per_second,
    peak_of,
    speed_table,
    tokens_per_second,
    utilisation,
)
from fastalign.trainers import train_ppo, train_sft
from tests.small_runs import _one_thread, folder, ppo_config, read_metrics, sft_config

__all__ = ["_one_thread", "folder"]

MEBIBYTE = 2**20


def row(step: int, seconds: Any, speed: Any, **others: Any) -> dict[str, Any]:
    return {"step": step, "step_seconds": seconds, "tokens_per_second": speed, **others}


# 100 + 300 + 200 tokens in 1 + 2 + 1 seconds.
ROWS = [
    row(1, 1.0, 100.0, peak_memory_bytes=2 * MEBIBYTE, grad_norm=1.0, skipped=0),
    row(2, 2.0, 150.0, peak_memory_bytes=5 * MEBIBYTE, grad_norm="nan", skipped=1),
    row(3, 1.0, 200.0, peak_memory_bytes=5 * MEBIBYTE, grad_norm=4.0, skipped=0),
]
H100 = {"device": "NVIDIA H100 80GB HBM3", "num_processes": 2, "products": "bfloat16"}
RUN = RunRecord(
    name="run",
    config={"model": {"lora": {"rank": 0}}},
    metrics=MetricTable(ROWS),
    evaluation=None,
    samples=[],
    machine=H100,
    num_product_weights=10**11,
)


def test_the_numbers() -> None:
    assert tokens_per_second(RUN) == 150.0
    assert model_flops_per_second(RUN) == 6 * 10**11 * 150
    assert utilisation(RUN) == pytest.approx(9e13 / (2 * 989.4e12))
    dash = "\u2013"
    assert speed_table([RUN, replace(RUN, metrics=MetricTable([{"step": 1}]))]) == [
        ("run", "3", "1", "1.00", "150", "5", "2.5", "4", "9e+13", "4.5%")
    ]
    bare = [row(1, 2.0, 50.0), row(2, "nan", 3.0), row(3, 1.0, None)]
    other = replace(RUN, metrics=MetricTable(bare), machine={}, num_product_weights=None)
    (found,) = speed_table([other])
    assert found == ("run", "2", "0", "1.50", "50", dash, dash, dash, dash, dash)
    assert len(found) == len(SPEED_COLUMNS)


def test_a_frozen_base_has_no_gradient_of_its_weights() -> None:
    adapted = replace(RUN, config={"model": {"lora": {"rank": 8}}})
    assert model_flops_per_second(adapted) == 4 * 10**11 * 150
    assert model_flops_per_second(replace(RUN, config={"sampling": {}})) is None


def test_utilisation_is_told_only_where_the_peak_is_known() -> None:
    def peak(device: str, products: str = "bfloat16") -> float | None:
        return peak_of({"device": device, "num_processes": 1, "products": products})

    assert peak("NVIDIA H100 80GB HBM3") == 989.4e12
    assert peak("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak("NVIDIA L4") == PEAKS["NVIDIA L4"] < PEAKS["NVIDIA L40S"] == peak("NVIDIA L40S")
    assert peak("NVIDIA H100 80GB HBM3", "float32") is None
    assert peak("NVIDIA A100 80GB PCIe") == 312e12
    assert peak("NVIDIA A100-SXM4-80GB MIG 1g.10gb") is None
    assert peak("NVIDIA L400") is None
    assert peak("cpu x86_64") is None
    assert peak_of({}) is None
    assert utilisation(replace(RUN, machine={})) is None


def test_weights_that_a_token_is_multiplied_by(tmp_path: Path) -> None:
    assert num_product_weights(tmp_path / "none") is None
    table, layer, head = torch.zeros(10, 4), torch.zeros(4, 4), torch.zeros(10, 4)
    save_file({"model.embed_tokens.weight": table}, tmp_path / "model-1.safetensors")
    save_file({"model.layers.0.weight": layer}, tmp_path / "model-2.safetensors")
    assert num_product_weights(tmp_path) == 56  # the table is the head
    save_file({"lm_head.weight": head}, tmp_path / "model-3.safetensors")
    assert num_product_weights(tmp_path) == 56  # the head is another, the table only looked up
    (tmp_path / "model-3.safetensors").write_bytes(b"{")
    with pytest.raises(ValueError, match=r"model-3\.safetensors: a file of the run is damaged"):
        num_product_weights(tmp_path)


def test_skipped_steps_are_marked_under_the_norms() -> None:
    (section,) = sections([RUN])
    charts = {chart.key: chart for chart in section.charts}
    (norms,) = charts["grad_norm"].lines
    assert list(norms.xs) == [1, 2, 3]
    assert [(mark.step, mark.kind) for mark in charts["grad_norm"].marks] == [(2, "skipped")]
    assert charts["tokens_per_second"].marks == []
    (memory,) = charts["peak_memory_bytes"].lines
    assert (memory.ys, charts["peak_memory_bytes"].unit) == ([n / 1024 for n in (2, 5, 5)], "GiB")
    assert 'data-tip="this step changed no weight"' in str(static_chart(charts["grad_norm"]))


def test_a_real_run_s_numbers(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train_sft(sft_config(folder, "run", max_steps=3))
    record, rows = read_run(folder / "run"), read_metrics(folder / "run")
    model = AutoModelForCausalLM.from_pretrained(folder / "run/model")
    names = [name for name, _ in model.named_parameters()]
    weights = sum(p.numel() for p in model.parameters())
    if "lm_head.weight" in names:
        weights -= model.get_input_embeddings().weight.numel()
    assert record.num_product_weights == weights
    speed = rows[-1]["num_tokens"] / sum(entry["step_seconds"] for entry in rows)
    assert tokens_per_second(record) == pytest.approx(speed)
    assert model_flops_per_second(record) == pytest.approx(6 * weights * speed)
    assert record.machine["products"] == "float32"
    assert record.machine["num_processes"] == 1
    assert record.machine["device"].startswith("cpu ")
    capsys.readouterr()
    assert main(["report", str(folder / "run"), "--out", str(folder / "report.html")]) == 0
    out = capsys.readouterr().out
    page = (folder / "report.html").read_text()
    part = page[page.index("<h2>Speed</h2>") :]
    cells = re.findall(r"<td[^>]*>(.*?)</td>", part)[: len(SPEED_COLUMNS)]
    assert cells == list(speed_table([record])[0])
    assert cells[:3] == ["run", "3", "0"]
    for cell in (*SPEED_COLUMNS, *cells):
        assert cell in out
    for label in ("Gradient norm", "Speed", "Peak memory"):
        assert f'aria-label="{label} against the step"' in page


def test_a_run_that_samples_has_phases_and_no_model_flops(folder: Path) -> None:
    train_ppo(ppo_config(folder, "ppo", max_steps=2))
    record = read_run(folder / "ppo")
    (found,) = speed_table([record])
    assert float(found[3]) > 0
    assert found[-2:] == ("\u2013", "\u2013")
    page = render([record])
    assert page.index("<h2>Speed</h2>") < page.index("<h2>Time of an iteration</h2>")


def test_a_table_of_metrics_gives_the_rows_it_was_made_of() -> None:
    rows: list[Any] = [{"step": 1}, {"step": 2, "loss": "nan", "note": None}, {"loss": True}, {}]
    table = MetricTable(rows)
    assert list(table) == table[:] == rows
    assert table.series("loss")[0] == [2]
    assert math.isnan(table.series("loss")[1][0])
    assert table.has("note").tolist() == [False, True, False, False]
    assert table.numbers("note")[0].tolist() == [False] * 4


def test_thinned_points_keep_spikes_gaps_and_the_ends() -> None:
    values = [math.sin(place / 50) for place in range(20_000)]
    values[7001], values[7002], values[9000] = 50.0, -50.0, math.nan
    steps, kept, means = thinned(np.arange(1, 20_001), np.array(values), MOST_BINS)
    assert len(kept) <= 2 * MOST_BINS + 3
    assert {1, 7002, 7003, 9001, 20_000} <= set(steps)
    assert [values[step - 1] for step in steps if step != 9001] == [v for v in kept if v == v]
    assert means is not None
    finite = [value for value in values if value == value]
    assert len(means[1]) == MOST_BINS
    assert math.fsum(means[1]) / MOST_BINS == pytest.approx(math.fsum(finite) / 20_000, abs=1e-4)
    few = list(range(100))
    drawn = thinned(np.array(few), np.array(values[:100]), MOST_BINS)
    assert drawn == (few, values[:100], None)
