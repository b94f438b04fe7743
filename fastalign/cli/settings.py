"""Settings of the commands that load models, apart from their code: `--help` loads no torch."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from fastalign.choices import Packing, PackingChoice
from fastalign.cli.algorithms import ALGORITHMS
from fastalign.evaluation.judge.chat_endpoint import EndpointConfig
from fastalign.rollouts.engines.options import SamplerName, VllmOptions, check_sampler
from fastalign.rollouts.sampler import SamplingParams

if TYPE_CHECKING:
    from fastalign.compute import Compute

DATA_USAGE = "usage: fastalign data check FILE [--help]"
ESTIMATE_USAGE = """usage: fastalign estimate COMMAND [--config FILE] FLAGS

Print the memory of a run of COMMAND (sft, dpo, kto, reward, ppo, grpo or rloo)
by use and phase, and whether it fits. It loads no weights and writes no folder:
the model's folder needs only its configuration and its tokenizer. Completions
that are sampled count as long as they may become. online-dpo is not estimated.

--ranks N     memory of each of N ranks (torchrun) with the `parallel` settings
--json FILE   also write the estimate to FILE
--overwrite   replace FILE if it exists

All other flags are those of COMMAND.

The exit code is 0 if the run fits and 1 if it does not."""

PREFLIGHT_SECONDS = 50.0  # with the imports before, a minute
PREFLIGHT_USAGE = f"""\
usage: fastalign preflight [--timeout-seconds S] [--world-size N] COMMAND FLAGS

Start it as the run will be started (torchrun ... -m fastalign preflight dpo --config F), with the
run's command ({" | ".join(ALGORITHMS)}) and flags. Checks that all ranks come, with one
configuration and the same versions, each with a device of its own; that run.dir is one folder for
all, and can be written; and that a sum over the ranks is right. It trains nothing, and leaves
nothing behind.

--timeout-seconds S: the check ends after this time, whatever hangs (default {PREFLIGHT_SECONDS:g})
--world-size N: the number of ranks that is expected (default: WORLD_SIZE)

Exit code 0: the run can start; 2, on every rank: it cannot, and a line says why."""


@dataclass(frozen=True)
class SampledModel:
    """The model to sample from."""

    path: str
    """Folder in transformers' layout, or a hub name."""
    trust_remote_code: bool = False
    """Run the Python code that comes with the model."""
    device: str = "auto"
    """Device such as cpu, cuda or cuda:1; auto takes a GPU if there is one."""

    def compute(self, packing: Packing = "shared_prefix") -> "Compute":
        """Return how this model's forwards run: on its device, in the dtype of its weights."""
        from fastalign.compute import Compute, find_device

        return Compute(find_device(self.device, "model.device"), packing=packing)


@dataclass(frozen=True)
class SamplingRun:
    """Randomness of the samples."""

    seed: int = 0
    """Random seed; the same seed draws the same tokens however they are batched."""


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """Base class of the settings of a command that samples."""

    sampling: SamplingParams = field(default_factory=SamplingParams)
    sampler: SamplerName = "transformers"
    """Engine that draws completions: the model itself (transformers), vLLM in this process, or
    a vLLM server (vllm-server)."""
    vllm: VllmOptions = field(default_factory=VllmOptions)
    run: SamplingRun = field(default_factory=SamplingRun)
    overwrite: bool = False
    """Replace files that exist."""

    def __post_init__(self) -> None:
        check_sampler(self.sampler, self.vllm)


@dataclass(frozen=True)
class GenerateData:
    """The prompts."""

    prompts: str
    """File, folder or hub name with a `prompt` column."""
    columns: tuple[str, ...] = ()
    """Columns of the prompts' rows to write beside each completion, such as the answer that a
    reward of `label-by-reward` takes."""


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(SamplingConfig):
    """Write a row per completion: prompt, completion, logprob, finish_reason, sample."""

    model: SampledModel
    data: GenerateData
    out: str
    """File (.jsonl) to write."""


@dataclass(frozen=True)
class ScoringModel(SampledModel):
    """The reward model."""


@dataclass(frozen=True)
class ScoreData:
    """The answers."""

    samples: str
    """File with `prompt` and `completion`, as written by `fastalign generate`."""


@dataclass(frozen=True)
class ScoreConfig:
    """Write every row with its `reward`, scored at the EOS that is appended to the answer."""

    model: ScoringModel
    data: ScoreData
    out: str
    """File (.jsonl) to write."""
    raw: bool = False
    """Write the scores of transformers, without normalising by reward_mean and reward_std."""
    overwrite: bool = False
    """Replace the file if it exists."""


@dataclass(frozen=True)
class LabelData:
    """The samples."""

    samples: str
    """File written by `fastalign generate` with several completions per prompt."""
    ties: Literal["drop", "keep"] = "drop"
    """Drop and count prompts whose completions all have the same reward, or keep them as ties."""


@dataclass(frozen=True)
class LabelConfig:
    """Write each prompt's best completion as chosen and its worst as rejected."""

    data: LabelData
    reward: str
    """`module:function` (prompts, completions, columns by name) -> numbers, a reward model, or a
    .json file."""
    out: str
    """File (.jsonl) to write."""
    overwrite: bool = False
    """Replace the file if it exists."""


@dataclass(frozen=True)
class EvalReference:
    """The reference model of the KL and the implicit reward."""

    path: str
    """Folder in transformers' layout, or a hub name."""


@dataclass(frozen=True)
class EvalData:
    """Held-out prompts, preference pairs, or both."""

    prompts: str | None = None
    """Prompts to sample completions for, which reward and KL are measured on."""
    pairs: str | None = None
    """Preference pairs that accuracy is measured on, without ties, which are counted."""
    max_length: int = 1024
    """Maximum number of tokens of a prompt with one response; a longer pair is an error."""


@dataclass(frozen=True)
class EvalLoss:
    """Scale of the implicit reward."""

    beta: float = 0.1
    """Scale of the margin, which does not change the accuracy."""


@dataclass(frozen=True, kw_only=True)
class EvalConfig(SamplingConfig):
    """Measure accuracy on pairs, or reward and KL of samples; write OUT and samples.jsonl."""

    model: SampledModel
    reference: EvalReference
    out: str
    """File (.json) to write."""
    data: EvalData = field(default_factory=EvalData)
    reward: str | None = None
    """`module:function` (prompts, completions, columns by name) -> numbers, a reward model, or a
    .json file."""
    best_of: tuple[int, ...] = ()
    """Also measure the reward of the best of n answers for each n, such as 1 2 4 8 16."""
    best_of_reward: str | None = None
    """Reward that chooses the best answer; by default `reward` itself."""
    loss: EvalLoss = field(default_factory=EvalLoss)
    packing: PackingChoice = "auto"
    """Packing of the log-prob computation; auto is shared_prefix where that is exact, else
    padded."""


@dataclass(frozen=True)
class Side:
    """One side of the comparison: a model to sample from, or a file of its samples."""

    path: str | None = None
    """Folder in transformers' layout, or a hub name, to sample from."""
    samples: str | None = None
    """File written by `fastalign generate` for the same prompts as the other side."""
    trust_remote_code: bool = False
    """Run the Python code that comes with the model."""
    device: str = "auto"
    """Device such as cpu, cuda or cuda:1; auto takes a GPU if there is one."""


@dataclass(frozen=True)
class WinRateData:
    """The prompts."""

    prompts: str | None = None
    """File, folder or hub name with a `prompt` column, if a side is sampled from."""


@dataclass(frozen=True, kw_only=True)
class WinRateConfig(SamplingConfig):
    """Compare two models' answers; write OUT and every pair's verdict to OUT.verdicts.jsonl."""

    model: Side
    baseline: Side
    out: str
    """File (.json) to write."""
    reward: str | None = None
    """Reward as judge: `module:function`, a reward model, or a .json file."""
    judge: EndpointConfig = field(default_factory=EndpointConfig)
    data: WinRateData = field(default_factory=WinRateData)


@dataclass(frozen=True)
class ServedModel:
    """The model that training starts from, for its sizes and its tokenizer."""

    path: str
    """Folder in transformers' layout, or a hub name."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of weights and products; auto: float32 on a CPU, bfloat16 on a GPU."""
    lora_rank: int = 0
    """Rank of the adapters to make room for, if the policy is trained with one."""
    trust_remote_code: bool = False
    """Run code that comes with the model."""


@dataclass(frozen=True)
class VllmServerConfig:
    """Starts vLLM's HTTP server for runs with the sampler `vllm-server` and this server's URL.

    The run's weights replace its own. It asks for a token, which is made and written to a file for
    this user alone, or is that of FASTALIGN_VLLM_TOKEN in the environment. Who has it can change
    the weights and make the server read files, so it listens to this machine only, unless another
    address is given.
    """

    model: ServedModel
    host: str = "127.0.0.1"
    """Address to listen at."""
    port: int = 8000
    """Port to listen at."""
    token_file: str | None = None
    """File of the token; if it exists, it holds the token. Default: a new one, by the port, in the
    user's cache folder, where runs on this machine look for it."""
    max_length: int | None = None
    """Most tokens of a prompt with its answer; default: the model's positions."""
    tensor_parallel: int = 1
    """Number of GPUs that the model is split over."""
    gpu_memory: float = 0.9
    """Share of a GPU's memory to use."""
    kv_cache_gib: float = 0.5
    """Memory for keys and values on a CPU, in GiB."""


@dataclass(frozen=True)
class PushConfig:
    """Send a model or an adapter that fastalign wrote to the Hugging Face hub, in one commit.

    The token is that of `hf auth login` or HF_TOKEN. Nothing else of a run is sent.
    """

    folder: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    """Folder to send, such as runs/dpo/model; refused if a file in it was changed."""
    repo: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="REPO")]
    """Repository, as owner/name; it is made if there is none."""
    private: bool = False
    """Make the repository private; one that is public already is refused."""
    revision: str | None = None
    """Branch to commit to, which is made if there is none; by default the main one."""
    dry_run: bool = False
    """List the files and their sizes; send nothing, and ask the hub nothing."""


@dataclass(frozen=True)
class DoctorConfig:
    """Print the versions, devices and backends that fastalign can use here."""

    device: Literal["all", "cpu", "cuda"] = "all"
    """Devices to examine; all is the CPU, and a GPU if there is one."""
    model: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="[MODEL]")] = None
    """Folder or hub name of a model: print what a small copy of it shows, and nothing else."""
    trust_remote_code: bool = False
    """Run the Python code that comes with the model."""
