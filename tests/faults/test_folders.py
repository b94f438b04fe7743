"""Folders: another run's, one in use, other settings, data or model; metrics.jsonl damaged."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.faults.injected import Happens, UntilWritten
from tests.faults.real import Stage, assert_same_bits, contents
from tests.faults.table import ALONE, DDP, FSDP, Place, fault
from tests.runs.checkpoint.checkpoint_cases import flip_last_byte


@fault(
    "a new run in a folder that holds another",
    *(ALONE, DDP),
    does="`run.dir: ... holds another run; add --run.resume to go on with it, or choose another "
    "folder`, exit code 2; the other run is not touched",
)
def test_another_run(stage: Stage, run: str, place: Place) -> None:
    there = stage.copy_of(stage.straight(place), run, last=8)
    before = contents(there)
    assert stage.run(place, run).codes == [2] * place.num_ranks
    assert contents(there) == before


@fault(
    "two runs in one folder at once",
    *(ALONE, DDP),
    does="the second: `run.dir: another process is training in`, exit code 2; the first ends with "
    "the bits of a run alone",
)
def test_two_at_once(stage: Stage, run: str, place: Place) -> None:
    go_on, waits = stage.folder / f"{run}.go-on", stage.folder / f"{run}.waits"
    held = Happens(UntilWritten([go_on], b"go on", waits), step=3)
    first = stage.start(place, run, faults=[held])
    UntilWritten([waits], b"waits")()
    for flags in ((), ("--run.resume",)):
        second = stage.run(place, run, *flags, logs=f"{run}-second")
        assert second.codes == [2] * place.num_ranks
    go_on.write_text("go on")
    done = stage.end(run, first)
    assert done.codes == [0] * place.num_ranks
    assert_same_bits(done, stage.straight(place))


@fault(
    "a folder called model in run.dir, or in the folder of an export, that the run did not make",
    *(ALONE, DDP),
    does="`run.dir: ...model exists and is not an empty folder (this run did not make it); "
    "--run.overwrite replaces it, or choose another place`, for an export `run.export: ...model "
    "exists`, exit code 2 before anything is loaded; nothing in it is touched. What the run wrote "
    "itself, and nobody changed, is replaced",
)
def test_a_foreign_model(stage: Stage, run: str, place: Place) -> None:
    mine = stage.folder / run / "model/notes.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    assert stage.run(place, run).codes == [2] * place.num_ranks
    assert [path for path in (stage.folder / run).rglob("*") if path.is_file()] == [mine]
    there = stage.copy_of(stage.straight(place), f"{run}-stopped", last=3)
    out = stage.folder / f"{run}-out"
    export = ("--run.resume", "--run.export", str(out))
    for _ in range(2):
        assert stage.run(place, there.folder.name, *export).codes == [0] * place.num_ranks
    (out / "model/notes.txt").write_text("mine")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert stage.run(place, there.folder.name, *export).codes == [2] * place.num_ranks
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


@contextmanager
def other_content(file: Path, old: str, new: str) -> Iterator[None]:
    before = file.read_bytes()
    assert old.encode() in before
    file.write_bytes(before.replace(old.encode(), new.encode()))
    try:
        yield
    finally:
        file.write_bytes(before)


@fault(
    "a resume with other settings, on other data, with another reference, of another model",
    *(ALONE, FSDP),
    does="`run.resume: these settings differ from the run's: optim.lr (0.001, now 0.002)`, "
    "`run.resume: the training data, the held-out data are not what ...step-000003 was trained "
    "on`, `run.resume: the frozen reference is not what ...step-000003 was trained on` (of a model "
    "of another shape, too): exit code 2, and nothing is changed",
)
def test_other_things(stage: Stage, run: str, place: Place) -> None:
    stopped = stage.copy_of(stage.straight(place), run, last=3)
    before = contents(stopped)

    def refused(*flags: str) -> None:
        outcome = stage.run(place, run, "--run.resume", *flags)
        assert outcome.codes == [2] * place.num_ranks
        assert contents(stopped) == before

    refused("--optim.lr", "0.002")
    with other_content(stage.folder / "pairs.jsonl", "camera", "battery"):
        refused()
    weights = stage.folder / "llama/model.safetensors"
    plain = weights.read_bytes()
    flip_last_byte(weights)
    refused()
    weights.write_bytes(plain)
    config = stage.folder / "llama/config.json"
    with other_content(config, '"num_hidden_layers": 2', '"num_hidden_layers": 1'):
        refused()
    assert_same_bits(stage.finish(place, run, "--run.resume"), stage.straight(place))


@fault(
    "a PPO run resumed with another reward function's file, other demonstrations (ppo.ptx_data), "
    "another config.json of its model",
    ALONE,
    does="`run.resume: the reward (words: words.json) is not what ...step-000003 was trained on; "
    "--run.accept-changed reward goes on with it all the same`, `the data of ppo.ptx_data is not`, "
    "`the starting model (rms_norm_eps of config.json 1e-06, now 1e-05)`: exit code 2, and nothing "
    "is changed; with the flag it goes on, and says so: `goes on with another reward`",
)
def test_other_inputs(stage: Stage, run: str, place: Place) -> None:
    stopped = stage.copy_of(stage.straight(place, "ppo"), run, last=3)
    before = contents(stopped)
    llama, words = stage.folder / "llama", stage.folder / "words.json"
    for file, old, new in [
        (words, '"bias": 0.5', '"bias": 0.25'),
        (stage.folder / "texts.jsonl", "camera", "battery"),
        (llama / "config.json", '"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'),
    ]:
        with other_content(file, old, new):
            assert stage.run(place, run, "--run.resume", trainer="ppo").codes == [2]
        assert contents(stopped) == before
    flags = ("--run.resume", "--run.accept-changed", "reward")
    with other_content(words, '"bias": 0.5', '"bias": 0.25'):
        stage.finish(place, run, *flags, trainer="ppo")


@fault(
    "metrics.jsonl longer than the checkpoint knows, its last line broken off",
    *(ALONE, DDP),
    does="what the checkpoint does not know is dropped and logged again: each step is there once, "
    "with the bits of a run without a stop; `resumed from ...step-000003`",
)
def test_metrics_too_long(stage: Stage, run: str, place: Place) -> None:
    stopped = stage.copy_of(stage.straight(place), run, last=3)
    metrics = stopped.folder / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes()[:-40])
    assert_same_bits(stage.finish(place, run, "--run.resume"), stage.straight(place))


@fault(
    "metrics.jsonl shorter than the checkpoint knows, or gone",
    *(ALONE, DDP),
    does="`metrics.jsonl: expected at least the ... bytes that the checkpoint of step 3 knows, got "
    "0`, exit code 2; nothing is changed (a checkpoint has its name when metrics.jsonl is on the "
    "disk)",
)
def test_metrics_too_short(stage: Stage, run: str, place: Place) -> None:
    stopped = stage.copy_of(stage.straight(place), run, last=3)
    metrics = stopped.folder / "metrics.jsonl"
    whole = metrics.read_bytes()
    metrics.unlink()
    assert stage.run(place, run, "--run.resume").codes == [2] * place.num_ranks
    metrics.write_bytes(whole)
    assert_same_bits(stage.finish(place, run, "--run.resume"), stage.straight(place))
