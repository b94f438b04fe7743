"""The launch scripts: one after another with real ranks on a CPU, Slurm's commands in stubs."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "scripts/launch"
SCRIPTS = ("one_node.sh", "many_nodes.sh", "slurm.sbatch")
# Says how it was called; a run waits for SIGTERM and then leaves as a saved one does.
RANK = f"""#!{sys.executable}
import os, signal, sys
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR")
line = " ".join([*(os.environ[name] for name in names), *sys.argv[1:]])
with open(os.environ["CALLS"], "a") as calls:
    calls.write(line + "\\n")
if "preflight" in sys.argv:
    sys.exit(int(os.environ.get("PREFLIGHT_CODE", "0")))
if "FINISHES" in os.environ:
    os.makedirs(sys.argv[sys.argv.index("--run.dir") + 1] + "/model", exist_ok=True)
    sys.exit(0)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
with open(os.environ["READY"], "w") as ready:
    ready.write("ready\\n")
signal.pause()
"""
# As srun does: a task each, and Slurm's signal to the tasks, once they are ready for it.
SRUN = """#!/usr/bin/env bash
shift
pids=() code=0
for ((i = 0; i < SLURM_NTASKS; i++)); do
    SLURM_PROCID=$i SLURM_LOCALID=$((i % 2)) "$@" &
    pids+=($!)
done
if [[ " $* " != *" preflight "* ]] && [ -z "${FINISHES:-}" ]; then
    for pid in "${pids[@]}"; do read -r < "$READY"; done
    kill -TERM "${pids[@]}"
fi
for pid in "${pids[@]}"; do wait "$pid" || code=$?; done
exit $code
"""
SCONTROL = """#!/usr/bin/env bash
[ "$1" = requeue ] && echo "scontrol $*" >> "$CALLS" || printf 'node-a\\nnode-b\\n'
"""


def call(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(LAUNCH / script), *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHON": sys.executable, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def run_flags(folder: Path) -> list[str]:
    return ["--model.path", "m", "--data.train", "d", "--run.dir", str(folder)]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_is_bash_and_says_what_it_needs(script: str) -> None:
    subprocess.run(["bash", "-n", str(LAUNCH / script)], check=True)
    done = call(script, NNODES="1", NODE_RANK="0", RDZV="localhost:29500")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "expected a command and its flags" in done.stderr


@pytest.mark.parametrize(
    ("environment", "name"),
    [
        ({"NNODES": "two"}, "NNODES"),
        ({"NNODES": "2", "NODE_RANK": "2"}, "NODE_RANK"),
        ({"NNODES": "2", "NODE_RANK": "1", "RDZV": "host"}, "RDZV"),
        ({"NNODES": "2", "NODE_RANK": "1", "RDZV": "host:1", "NPROC": "0"}, "NPROC"),
    ],
)
def test_many_nodes_names_a_variable_that_does_not_fit(
    environment: dict[str, str], name: str
) -> None:
    done = call("many_nodes.sh", "dpo", **environment)
    assert done.returncode == 2
    assert name in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """What a job sees, its commands in stubs."""
    for name, text in (("python", RANK), ("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    os.mkfifo(tmp_path / "ready")
    return {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "PYTHON": str(tmp_path / "python"),
        "CALLS": str(tmp_path / "calls"),
        "READY": str(tmp_path / "ready"),
        "SLURM_JOB_NODELIST": "node-[a-b]",
        "SLURM_JOB_ID": "7",
        "SLURM_NTASKS": "4",
        "SLURM_NNODES": "2",
    }


def calls_of(slurm: dict[str, str]) -> list[str]:
    path = Path(slurm["CALLS"])
    lines = sorted(path.read_text().splitlines())
    path.unlink()
    return lines


def test_one_node_checks_its_ranks_before_it_starts_them(
    slurm: dict[str, str], tmp_path: Path
) -> None:
    words = ["dpo", "--run.dir", str(tmp_path / "run")]
    launch = "0 0 1 a -m torch.distributed.run --standalone --nproc-per-node 2 -m fastalign"
    check = f"{launch} preflight --world-size 2 {' '.join(words)}"
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "a"}
    stubs = {**slurm, **place, "NPROC": "2", "FINISHES": "1"}
    for arguments, more, code, expected in (
        (["preflight", *words], {}, 0, [check]),
        (words, {}, 0, [check, f"{launch} {' '.join(words)}"]),
        (words, {"PREFLIGHT_CODE": "1"}, 2, [check]),
    ):
        done = call("one_node.sh", *arguments, **stubs, **more)
        assert done.returncode == code, done.stderr
        calls = Path(slurm["CALLS"])
        assert calls.read_text().splitlines() == expected
        calls.unlink()


def test_one_node_stops_where_the_check_fails(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = call("one_node.sh", "dpo", *run_flags(tmp_path / "file/run"), NPROC="1")
    assert done.returncode == 2
    assert "cannot be written" in done.stderr
    assert "no model" not in done.stderr  # which the run itself would have said


def test_many_nodes_checks_the_ranks_of_two_machines() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        rdzv = f"127.0.0.1:{probe.getsockname()[1]}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHON": sys.executable}
    environment |= {"NNODES": "2", "RDZV": rdzv, "NPROC": "1"}
    command = [str(LAUNCH / "many_nodes.sh"), "preflight", "dpo", *run_flags(ROOT / "runs/none")]
    nodes = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env={**environment, "NODE_RANK": str(node)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for node in range(2)
    ]
    said = [node.communicate(timeout=300)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    assert "2 of 2 ranks are ready" in said[0]
    assert not (ROOT / "runs/none").exists()


def test_slurm_s_signal_reaches_the_ranks_and_a_stopped_run_is_queued_again(
    slurm: dict[str, str], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    slurm["SLURM_NTASKS"] = "1"  # a fifo tells who is ready, not how many are
    words = ["dpo", "--config", "a file.yaml", "--run.dir", str(folder)]
    done = call("slurm.sbatch", *words, **slurm)
    assert done.returncode == 0, done.stderr
    run = f"dpo --config a file.yaml --run.dir {folder}"
    assert calls_of(slurm) == [
        f"0 0 1 node-a -m fastalign {run}",
        f"0 0 1 node-a -m fastalign preflight --world-size 1 {run}",
        "scontrol requeue 7",
    ]
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("{}\n")  # a run that never saved begins again
    call("slurm.sbatch", *words, FINISHES="1", **slurm)
    assert not any("--run.resume" in line for line in calls_of(slurm))
    (folder / "model").rmdir()
    (folder / "checkpoints/step-000003").mkdir(parents=True)
    done = call("slurm.sbatch", *words, FINISHES="1", **slurm)
    assert done.returncode == 0, done.stderr
    assert calls_of(slurm) == [
        f"0 0 1 node-a -m fastalign {run} --run.resume",
        f"0 0 1 node-a -m fastalign preflight --world-size 1 {run} --run.resume",
    ]


def test_slurm_numbers_the_ranks_and_stops_where_the_check_fails(
    slurm: dict[str, str], tmp_path: Path
) -> None:
    words = ["dpo", f"--run.dir={tmp_path / 'run'}"]
    done = call("slurm.sbatch", *words, PREFLIGHT_CODE="2", **slurm)
    assert done.returncode == 2
    places = [f"{rank} {rank % 2} 4 node-a" for rank in range(4)]
    run = " ".join(words)
    assert calls_of(slurm) == [
        f"{place} -m fastalign preflight --world-size 4 {run}" for place in places
    ]


def test_slurm_is_told_to_signal_the_tasks_ahead_of_the_limit() -> None:
    lines = (LAUNCH / "slurm.sbatch").read_text().splitlines()
    assert "#SBATCH --signal=TERM@180" in lines  # B: in front would signal this script alone
    assert "#SBATCH --requeue" in lines
