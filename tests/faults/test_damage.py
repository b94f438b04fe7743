"""What is damaged, missing or foreign in a checkpoint is named; nothing of it is trained on."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastalign.runs.checkpoint.restore import fault_of
from fastalign.runs.checkpoint.writer import CHECKPOINTS
from fastalign.written_files import entry_of
from tests.faults.real import (
    Stage,
    assert_nothing_left_behind,
    assert_same_bits,
    contents,
    same,
)
from tests.faults.table import ALONE, DDP, FSDP, Place, fault
from tests.runs.checkpoint.checkpoint_cases import flip_last_byte
from tests.small_runs import saved_tensors


def shard(checkpoint: Path) -> Path:
    """Of the last rank."""
    return max(checkpoint.glob("*.safetensors"))


def shorten(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def add_a_shard(checkpoint: Path) -> None:
    shutil.copy(shard(checkpoint), checkpoint / "strange.safetensors")


# By the step whose checkpoint is damaged so, and what is said of it.
DAMAGES: dict[int, tuple[Callable[[Path], object], str]] = {
    8: (lambda path: flip_last_byte(shard(path)), "is damaged (its SHA-256 differs)"),
    7: (lambda path: shorten(shard(path)), "bytes, expected"),
    6: (lambda path: shard(path).unlink(), ".safetensors is missing"),
    5: (lambda path: shorten(path / "state.json"), "state.json has"),
    4: (lambda path: shorten(path / "manifest.json"), "manifest.json is damaged"),
    3: (add_a_shard, "strange.safetensors is not in manifest.json"),
}


@fault(
    "the newer checkpoints damaged: a byte of a shard flipped, a shard truncated, a shard deleted, "
    "state.json truncated, the manifest truncated, a shard too many; and one half written",
    *(ALONE, DDP, FSDP),
    does="`damaged checkpoint passed over: ...step-000008: ...is damaged (its SHA-256 differs)` "
    "and so on, each by name; `resumed from ...step-000002`, the newest good one, and it ends "
    "with the bits of a run without a stop",
    trl="a flipped byte: resumes, undetected; truncated or half-written: an error, no fall-back",
)
def test_damaged(stage: Stage, run: str, place: Place) -> None:
    straight = stage.straight(place)
    damaged = stage.copy_of(straight, run, last=8)
    folder = damaged.folder / CHECKPOINTS
    for step, (damage, _) in DAMAGES.items():
        damage(folder / f"step-{step:06d}")
    shutil.copytree(folder / "step-000008", folder / ".writing-step-000009")
    resumed = stage.finish(place, run, "--run.resume")
    lines = [line for line in resumed.outputs[0].splitlines() if line.startswith("damaged")]
    for (step, (_, said)), line in zip(DAMAGES.items(), lines, strict=True):
        assert f"step-{step:06d}: " in line
        assert said in line
    assert_same_bits(resumed, straight)
    assert_nothing_left_behind(resumed)


@fault(
    "every checkpoint damaged",
    *(ALONE, FSDP),
    does="`run.resume: no good checkpoint in ...step-000002: state.json is missing; "
    "...step-000001: manifest.json is missing`, exit code 2; nothing is changed",
    trl="trainer_state.json missing: an error",
)
def test_nothing_good(stage: Stage, run: str, place: Place) -> None:
    damaged = stage.copy_of(stage.straight(place), run, last=2)
    (damaged.folder / CHECKPOINTS / "step-000002/state.json").unlink()
    (damaged.folder / CHECKPOINTS / "step-000001/manifest.json").unlink()
    before = contents(damaged)
    assert stage.run(place, run, "--run.resume").codes == [2] * place.num_ranks
    assert contents(damaged) == before


def take_out(checkpoint: Path, name: str) -> None:
    """A tensor goes from the shards, or a rank's part of it; the manifest fits what is left."""
    holders = [path for path in checkpoint.glob("*.safetensors") if name in load_file(path)]
    path = min(holders)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors: dict[str, Tensor] = load_file(path)
    del tensors[name]
    places = json.loads(metadata["DCP_SHARDING_INFO"])
    del places[name]
    save_file(tensors, path, metadata | {"DCP_SHARDING_INFO": json.dumps(places)})
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    (checkpoint / "manifest.json").write_text(json.dumps(manifest | {path.name: entry_of(path)}))
    assert fault_of(checkpoint) is None


@fault(
    "an optimiser state that is gone from a checkpoint whose hashes fit",
    *(ALONE, DDP, FSDP),
    does="`has no optimizer state of lm_head.weight (exp_avg); --run.start-afresh optimizer begins "
    "that part anew`, exit code 2; with that option it goes on, and says so: `starts afresh "
    "(run.start_afresh): optimizer`",
    trl="optimizer.pt missing: resumes silently with fresh state (loss 0.7595 against 0.7330)",
)
def test_a_part_is_gone(stage: Stage, run: str, place: Place) -> None:
    stopped = stage.copy_of(stage.straight(place), run, last=3)
    newest = stopped.folder / CHECKPOINTS / "step-000003"
    take_out(newest, "optimizer.lm_head.weight.exp_avg")
    before = contents(stopped)
    assert stage.run(place, run, "--run.resume").codes == [2] * place.num_ranks
    assert contents(stopped) == before
    anew = stage.finish(place, run, "--run.resume", "--run.start-afresh", "optimizer")
    steps = saved_tensors(anew.folder / CHECKPOINTS / "step-000008", "optimizer.lm_head.weight.")
    assert float(steps["step"]) == 5
    assert not same(anew.checkpoint(8), stage.straight(place).checkpoint(8))


@fault(
    "a random state that is gone from a checkpoint whose hashes fit",
    *(ALONE, DDP),
    does="`has no random state of rank0.cpu; --run.start-afresh random begins that part anew`, "
    "exit code 2; with that option it goes on, and says so: `starts afresh "
    "(run.start_afresh): random`",
    trl="rng_state.pth missing: resumes silently",
)
def test_a_random_state_is_gone(stage: Stage, run: str, place: Place) -> None:
    stopped = stage.copy_of(stage.straight(place), run, last=3)
    take_out(stopped.folder / CHECKPOINTS / "step-000003", "random.rank0.cpu")
    assert stage.run(place, run, "--run.resume").codes == [2] * place.num_ranks
    stage.finish(place, run, "--run.resume", "--run.start-afresh", "random")
