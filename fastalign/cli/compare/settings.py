"""Settings of `fastalign compare` and its subcommands, apart from their code."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro

from fastalign.cli.settings import SampledModel, SamplingRun
from fastalign.rollouts.engines.options import SamplerName, VllmOptions, check_sampler
from fastalign.rollouts.sampler import SamplingParams

FILES = tyro.conf.arg(metavar="[FILE ...]")
DATABASE = tyro.conf.arg(metavar="DATABASE")


@dataclass(frozen=True)
class CompareData:
    """The pairs."""

    prompts: str | None = None
    """File, folder or hub name with a `prompt` column, where --a or --b is a model."""
    pairs_per_prompt: int = 6
    """Most pairs of a prompt's answers; 6 are all pairs of four answers."""


@dataclass(frozen=True)
class CompareServer:
    """The address of the page."""

    host: str = "127.0.0.1"
    """Address to listen at; by default this machine alone can reach the page."""
    port: int = 7860
    """Port to listen at; 0: any that is free."""
    names: tuple[str, ...] = ()
    """Names or addresses by which people call this machine, if --server.host is not of this
    machine alone; requests for other names are refused."""


@dataclass(frozen=True)
class ComparePage:
    """The look of the page."""

    title: str = "Which answer is better?"
    """Heading of the page."""
    markdown: bool = False
    """Show prompts and answers as Markdown, without links, images and HTML; by default as text."""


@dataclass(frozen=True)
class CompareChoice:
    """Choice of the next pair."""

    votes_per_pair: int = 1
    """Number of people who are asked about a pair; agreement needs 2."""
    repeat_share: float = 0.05
    """Share of pairs that come back to the same person with the sides swapped."""
    random_share: float = 0.2
    """Share of pairs drawn at random where --reward ranks the others; accuracy is measured on
    them."""
    refit_every: int = 50
    """Number of verdicts after which the head on --reward is fitted again."""


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Serve a page where people say which of two answers is better, and keep their votes.

    Files are samples of `fastalign generate`, or pairs of responses. Their pairs are added to the
    database; without files, the pairs that it has are shown. Subcommands: `compare export`,
    `compare import`, `compare results`.
    """

    files: Annotated[tuple[str, ...], tyro.conf.Positional, FILES] = ()
    """Samples (prompt, completion) or pairs (prompt, response_a, response_b)."""
    out: str = "comparisons.db"
    """Database of pairs and votes; it is made, or gone on with."""
    a: str | None = None
    """Model, or file of its samples, to compare with --b; nobody sees which is which."""
    b: str | None = None
    """Model, or file of its samples, to compare with --a."""
    reward: str | None = None
    """Reward model, or any causal model, whose frozen hidden states a head is fitted on while
    people label; it chooses the next pair."""
    annotators: str = "me"
    """Names of those who compare, with commas between; each has a link of their own."""
    data: CompareData = field(default_factory=CompareData)
    page: ComparePage = field(default_factory=ComparePage)
    choice: CompareChoice = field(default_factory=CompareChoice)
    server: CompareServer = field(default_factory=CompareServer)
    sampling: SamplingParams = field(default_factory=SamplingParams)
    sampler: SamplerName = "transformers"
    """Engine that draws the answers of --a and --b."""
    vllm: VllmOptions = field(default_factory=VllmOptions)
    device: str = "auto"
    """Device of models, such as cpu, cuda or cuda:1."""
    trust_remote_code: bool = False
    """Run the Python code that comes with a model."""
    run: SamplingRun = field(default_factory=SamplingRun)

    def __post_init__(self) -> None:
        check_sampler(self.sampler, self.vllm)
        if (self.a is None) != (self.b is None):
            raise ValueError("a: expected --a and --b together, got one of them")
        for name in ("votes_per_pair", "refit_every"):
            got = getattr(self.choice, name)
            if got < 1:
                raise ValueError(f"choice.{name}: expected at least 1, got {got}")
        if self.data.pairs_per_prompt < 1:
            got = self.data.pairs_per_prompt
            raise ValueError(f"data.pairs_per_prompt: expected at least 1, got {got}")
        for name in ("repeat_share", "random_share"):
            share = getattr(self.choice, name)
            if not 0 <= share <= 1:
                raise ValueError(f"choice.{name}: expected a share from 0 to 1, got {share:g}")


@dataclass(frozen=True)
class CompareExportConfig:
    """Write the compared pairs with label and votes, as the trainers read them."""

    database: Annotated[str, tyro.conf.Positional, DATABASE]
    """Database of `fastalign compare`; it may be in use."""
    out: str
    """File (.jsonl) to write."""
    both_bad: Literal["tie", "drop"] = "tie"
    """Count two bad answers as a tie, or leave those votes out."""
    details: bool = False
    """Also write source and models of a pair, and who voted, when, why and how fast."""
    overwrite: bool = False
    """Replace the file if it exists."""


@dataclass(frozen=True)
class CompareImportConfig:
    """Add comparisons that were made elsewhere, with their labels, to a database.

    Rows of chosen and rejected (hh-rlhf), of response_a, response_b, label and votes, Argilla's
    records, Label Studio's tasks, and what `compare export --details` wrote.
    """

    files: Annotated[
        tuple[str, ...],
        tyro.conf.Positional,
        tyro.conf.arg(metavar="FILE [FILE ...]", help_behavior_hint="(required)"),
    ]
    """Files, folders or hub names."""
    out: str
    """Database; it is made, or gone on with."""
    annotator: str = "imported"
    """Name for votes without one; they become those of NAME 1, NAME 2 and so on."""


@dataclass(frozen=True)
class CompareResultsConfig:
    """Print agreement, biases, the reward model's learning curve and human win rates."""

    database: Annotated[str, tyro.conf.Positional, DATABASE]
    """Database of `fastalign compare`; it may be in use."""
    out: str | None = None
    """File (.json) to write them to."""
    overwrite: bool = False
    """Replace the file if it exists."""


@dataclass(frozen=True, kw_only=True)
class ChatConfig:
    """Talk with a model in the terminal or on a page, with another one beside it if you like.

    Answers are written as they are drawn. A verdict on two of them becomes a comparison in the
    database, which `compare export` writes and `compare` goes on with. /help lists the words.
    """

    model: SampledModel
    beside: str | None = None
    """Folder or hub name of a second model, such as the reference; nobody sees which is which."""
    out: str = "comparisons.db"
    """Database of the verdicts; it is made, or gone on with."""
    system: str | None = None
    """Text of the system message."""
    page: bool = False
    """Talk on a page in the browser in place of the terminal; its link is printed."""
    markdown: bool = False
    """On the page, show answers as Markdown, without links, images and HTML."""
    server: CompareServer = field(default_factory=CompareServer)
    sampling: SamplingParams = field(default_factory=SamplingParams)
    run: SamplingRun = field(default_factory=SamplingRun)
