"""Losses and gradients that are not finite, and spikes: no weight moves, on any rank."""

import math
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.faults.injected import FarApart, NaNReference, Poison
from tests.faults.real import (
    NUM_STEPS,
    Stage,
    assert_nothing_left_behind,
    assert_same_bits,
    numbers,
    same,
)
from tests.faults.table import ALONE, DDP, FSDP, FSDP3, Place, fault


@fault(
    "a NaN or Inf in the loss, or in the gradient alone, of one micro-batch (the first, a middle "
    "one, the last) of the first rank or the last",
    *(ALONE, DDP, FSDP3),
    does="`step 2 skipped: loss nan...; no weight was changed by it`, `step 3 skipped: loss "
    "0...gradient norm nan`: no weight and no optimiser state moves by a bit, the run goes on, and "
    "no checkpoint holds a NaN",
    trl="logs 0.318, then 0.0 to the end; 39 of 39 parameters NaN, saved; exit code 0",
)
def test_not_finite(stage: Stage, run: str, place: Place) -> None:
    last = place.num_ranks - 1
    faults = [
        Poison(2, math.nan, "loss", "first", 0),
        Poison(3, math.nan, "gradient", "last", last),
        Poison(5, math.inf, "loss", "middle", last),
        Poison(6, -math.inf, "gradient", "first", last),
        Poison(8, math.nan, "gradient", "middle", 0),
    ]
    outcome = stage.finish(place, run, faults=faults)
    steps = [poison.step for poison in faults]
    assert outcome.skipped() == steps
    assert [step for step in range(2, NUM_STEPS + 1) if outcome.moved(step)] == [4, 7]
    assert all(f"step {step} skipped: loss " in outcome.outputs[0] for step in steps)
    assert all(value.isfinite().all() for value in outcome.checkpoint(NUM_STEPS).values())
    straight = stage.straight(place)
    assert same(outcome.checkpoint(3), straight.checkpoint(1))
    assert numbers(outcome.folder)[:1] == numbers(straight.folder)[:1]
    assert_nothing_left_behind(outcome)


@fault(
    "a NaN in three steps in a row",
    *(ALONE, FSDP),
    does="`stopped at step 5: 3 steps in a row had a non-finite loss or gradient`, exit code 2; "
    "the checkpoint of that step holds the weights of step 2, and a resumed run goes on from it",
)
def test_three_in_a_row(stage: Stage, run: str, place: Place) -> None:
    faults = [Poison(step, math.nan, rank=place.num_ranks - 1) for step in (3, 4, 5)]
    outcome = stage.run(place, run, "--train.save-every", "0", faults=faults)
    assert set(outcome.codes) == {2}
    assert outcome.skipped() == [3, 4, 5]
    assert same(outcome.checkpoint(5), stage.straight(place).checkpoint(2))
    resumed = stage.finish(place, run, "--run.resume")
    assert [row["step"] for row in numbers(resumed.folder)] == list(range(1, NUM_STEPS + 1))
    assert resumed.skipped() == [3, 4, 5]


WEIGHT = "model.layers.1.mlp.up_proj.weight"


def spoil(folder: Path, *, take_out: bool) -> None:
    """One weight of a model's folder becomes NaN, or is gone."""
    file = folder / "model.safetensors"
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    weights = load_file(file)
    weights[WEIGHT][3, 5] = math.nan
    if take_out:
        del weights[WEIGHT]
    save_file(weights, file, metadata)


@fault(
    "a NaN among the weights in the model's folder, or in the reference's",
    *(ALONE, FSDP),
    does="`the weights in ... are damaged: model.layers.1.mlp.up_proj.weight holds a value that is "
    "not finite`, exit code 2, before the first step",
)
def test_bad_model(stage: Stage, run: str, place: Place) -> None:
    bad = stage.folder / f"bad-{run}"
    shutil.copytree(stage.folder / "llama", bad)
    spoil(bad, take_out=False)
    for number, flag in enumerate(("--model.path", "--reference.path")):
        outcome = stage.run(place, f"{run}-{number}", flag, str(bad))
        assert outcome.codes == [2] * place.num_ranks
        assert str(bad) in outcome.outputs[0].splitlines()[-1]
        assert not (outcome.folder / "checkpoints").exists()


@fault(
    "a weight that is missing from the model's folder",
    *(ALONE, FSDP),
    does="`the weights in ... are incomplete: no model.layers.1.mlp.up_proj.weight`, exit code 2",
)
def test_a_weight_is_missing(stage: Stage, run: str, place: Place) -> None:
    bad = stage.folder / f"bad-{run}"
    shutil.copytree(stage.folder / "llama", bad)
    spoil(bad, take_out=True)
    assert stage.run(place, run, "--model.path", str(bad)).codes == [2] * place.num_ranks


@fault(
    "a weights' file of the model's folder that is cut off, or empty; a config.json that is "
    "broken, or has one layer less than there are weights for",
    ALONE,
    does="`the weights in ... cannot be read: model.safetensors: Error while deserializing`, "
    "`config.json: expected a JSON object`, `hold 9 tensors that the model of its config.json does "
    "not use (model.layers.1...)`: one line, exit code 2, before anything is written",
)
def test_damaged_model_files(stage: Stage, run: str, place: Place) -> None:
    for number, (name, change) in enumerate(DAMAGES):
        bad = stage.folder / f"bad-{run}-{number}"
        shutil.copytree(stage.folder / "llama", bad)
        (bad / name).write_bytes(change((bad / name).read_bytes()))
        outcome = stage.run(place, f"{run}-{number}", "--model.path", str(bad))
        assert outcome.codes == [2]
        assert "Traceback" not in outcome.outputs[0]
        assert str(bad) in outcome.outputs[0].splitlines()[-1]
        assert not (outcome.folder / "checkpoints").exists()


DAMAGES: list[tuple[str, Callable[[bytes], bytes]]] = [
    ("model.safetensors", lambda content: content[:-100]),
    ("model.safetensors", lambda content: b""),
    ("config.json", lambda content: content[:-20]),
    (
        "config.json",
        lambda content: content.replace(b'"num_hidden_layers": 2', b'"num_hidden_layers": 1'),
    ),
]


@fault(
    "a log-prob of the reference that is NaN",
    *(ALONE, DDP),
    does="`reference: the log-probs of ... pairs are not finite (the first is number 4)`, exit "
    "code 2; nothing of it is cached",
)
def test_bad_reference(stage: Stage, run: str, place: Place) -> None:
    cache = stage.folder / f"cache-{run}"
    flag = ("--reference.cache-dir", str(cache))
    outcome = stage.run(place, run, *flag, faults=[NaNReference(4)])
    assert outcome.codes == [2] * place.num_ranks
    assert not list(cache.rglob("*.safetensors"))
    assert_same_bits(stage.finish(place, run, *flag), stage.straight(place))


@fault(
    "a gradient's spike that one rank's examples cause (--optim.skip-sigma 8)",
    *(ALONE, DDP, FSDP),
    does="`step 35 skipped: ...no weight was changed by it` on every rank alike; the step after it "
    "is taken",
)
def test_spike(stage: Stage, run: str, place: Place) -> None:
    flags = ("--optim.skip-sigma", "8", "--train.max-steps", "36", "--train.eval-every", "0")
    flags += ("--train.batch-size", "3", "--train.tokens-per-batch", "100")
    spike = Poison(35, 1e4, "gradient", "first", place.num_ranks - 1)
    outcome = stage.finish(place, run, *flags, faults=[spike])
    assert outcome.skipped() == [35]
    assert [outcome.moved(step) for step in (34, 35, 36)] == [True, False, True]
    states = [outcome.state(step) for step in (34, 35)]
    assert states[0]["grad_norms"] == states[1]["grad_norms"]


@fault(
    "a NaN in one of the four updates of a PPO step",
    *(ALONE, DDP),
    does="`step 2: 1 of 4 updates skipped: loss nan...; no weight was changed by it`, and the "
    "other three are taken; three such steps in a row do not end the run",
)
def test_one_update_of_ppo(stage: Stage, run: str, place: Place) -> None:
    faults = [Poison(step, math.nan, "loss", "first", 0, once=True) for step in (1, 2, 3, 4)]
    outcome = stage.finish(place, run, faults=faults, trainer="ppo")
    assert [row["skipped"] for row in numbers(outcome.folder)] == [1, 1, 1, 1]
    assert all(outcome.moved(step) for step in (2, 3, 4))
    assert all(value.isfinite().all() for value in outcome.checkpoint(4).values())


@fault(
    "log-probs of the sampler that are lower than the policy's by 200 in a PPO step, whose ratios "
    "float32 cannot hold",
    *(ALONE, DDP),
    does="each log-ratio counts as 20 and its token gets no gradient by the ratio; "
    "policy/num_clamped counts them, no update is skipped, and every number stays finite",
)
def test_ratios_that_overflow(stage: Stage, run: str, place: Place) -> None:
    outcome = stage.finish(place, run, faults=[FarApart(2, 200.0, rank=None)], trainer="ppo")
    rows = numbers(outcome.folder)
    assert [row["policy/num_clamped"] > 0 for row in rows] == [False, True, False, False]
    assert not any(row["skipped"] for row in rows)
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert all(value.isfinite().all() for value in outcome.checkpoint(4).values())
