"""Reward functions by name: `module:function`, a bag of words, or a trained reward model.

A function may also take columns of the prompt's row, which its signature names.
"""

import importlib
import inspect
import json
import math
import numbers
import re
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastalign.rewards
from fastalign.batch.packed import Group, PackedBatch
from fastalign.compute import Compute, find_device
from fastalign.data.columns import RowColumns
from fastalign.data.conversation import content_as_json, json_as_content
from fastalign.data.examples import Content
from fastalign.data.tokenise import Encoder
from fastalign.data.tokenizer import load_tokenizer
from fastalign.in_memory import GivenModel, GivenReward, InMemory
from fastalign.models.architecture import num_positions
from fastalign.models.forward import response_values
from fastalign.models.load import choose_packing, load_reward_model, model_without_weights
from fastalign.models.reward import AdapterModel, RewardScale, response_reward, reward_scale
from fastalign.ranks.errors import UserCodeFailed
from fastalign.ranks.parallel import enter, load_on_first, share_by_fsdp

# (prompts, completions, and columns by name) -> one number each, in a list, an array or a tensor; a
# prompt is text or a list of {role, content}
RewardFunction = Callable[..., Any]
MOST_SHOWN = 100  # characters of a value that is refused


class BagOfWordsReward:
    """A transparent reward: a bias plus the weight of each word that the text contains.

    Args:
        path: JSON file with `bias` and `weights` (word -> number).

    Raises:
        ValueError: if the file does not have that form.
    """

    def __init__(self, path: str | Path):
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            self._bias = float(content["bias"])
            self._weights = {str(word): float(w) for word, w in content["weights"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path}: expected a JSON object with bias and weights: {error!r}"
            ) from None

    def score(self, text: str) -> float:
        """Return the reward of a text, in which each word counts once."""
        words = set(re.findall(r"[a-z][a-z']*", text.lower()))
        return self._bias + math.fsum(self._weights.get(word, 0.0) for word in sorted(words))

    def __call__(self, prompts: list[Any], completions: list[str]) -> list[float]:
        """Score prompt and completion together; in a conversation, the completion alone."""
        return [
            self.score(prompt + completion if isinstance(prompt, str) else completion)
            for prompt, completion in zip(prompts, completions, strict=True)
        ]


class ModelReward:
    """A trained reward model as a reward function: the score at the last token of each completion.

    A completion is tokenised as a response is in training, with an EOS: one that was cut off is
    scored as if it ended there. Scores are normalised by the `reward_mean` and `reward_std` of the
    model's configuration, which `fastalign reward` measures; models without them stay raw.

    Args:
        path: folder of a saved reward model, a hub name, or a model in memory.
        compute: its device, and its ranks and how they share models; all ranks call this with
            the same texts. None: a GPU if there is one, else the CPU. The rest of it is not used:
            scores do not depend on a run's precision or batches.
        raw: return scores as transformers serves them.
        trust_remote_code: run code that comes with the model.
        model: the adapter in `path`, opened on the base of another model, which is computed as
            `compute` says.

    Raises:
        ValueError: if there is no reward model; a causal model is refused, since its head would be
            random.
    """

    def __init__(
        self,
        path: str | Path,
        compute: Compute | None = None,
        *,
        raw: bool = False,
        trust_remote_code: bool = False,
        model: AdapterModel | None = None,
    ):
        self._tokenizer = load_tokenizer(path, trust_remote_code=trust_remote_code)
        self._encoder = Encoder(self._tokenizer)
        asked = compute or Compute(find_device("auto"))
        if model is None:
            self._compute, self._model = self._loaded(path, asked, trust_remote_code)
        else:
            self._compute, self._model = asked, model
        self._scale = RewardScale() if raw else reward_scale(self._model)

    @staticmethod
    def _loaded(path: str | Path, asked: Compute, trust_remote_code: bool) -> tuple[Compute, Any]:
        device = asked.device
        packing = choose_packing(
            "auto", [path], trust_remote_code=trust_remote_code, world=asked.world
        )
        compute = Compute(device, packing=packing, world=asked.world, parallel=asked.parallel)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust_remote_code}
        if asked.parallel.strategy != "fsdp":
            return compute, load_reward_model(path, compute, fresh_head=False, **options)
        host = Compute(packing=packing)
        model = load_on_first(
            asked.world,
            lambda: load_reward_model(path, host, fresh_head=False, **options),
            lambda: model_without_weights(path, compute, reward=True, **options),
        )
        model.requires_grad_(False)
        share_by_fsdp(model, dtype=dtype, device=device)
        return compute, model

    def __call__(self, prompts: Sequence[Any], completions: Sequence[str]) -> list[float]:
        """Return one score for each completion; a prompt is text or a list of {role, content}.

        Raises:
            ValueError: if an answer with its prompt is longer than the model's positions.
        """
        places: dict[Content, list[int]] = {}
        for place, prompt in enumerate(prompts):
            places.setdefault(json_as_content(prompt), []).append(place)
        groups = [self._group(prompt, members, completions) for prompt, members in places.items()]
        rewards = response_values(self._batch_scores, groups, self._compute)
        found: dict[int, float] = {}
        for members, values in zip(places.values(), rewards, strict=True):
            scores = self._scale.normalise(values.double())
            found.update(zip(members, scores.tolist(), strict=True))
        return [found[place] for place in range(len(completions))]

    @property
    def model(self) -> Any:
        """The network, sharded as the run's other models are."""
        return self._model

    def _batch_scores(self, batch: PackedBatch) -> Tensor:
        return enter(self._model, lambda: response_reward(self._model, batch, self._compute))

    def _group(self, prompt: Content, members: list[int], completions: Sequence[str]) -> Group:
        source = f"answer {members[0] + 1}"
        group = self._encoder.answers(source, prompt, [completions[i] for i in members])
        limit = num_positions(self._model.config) or 2**31
        for ids, place in zip(group.response_ids, members, strict=True):
            length = len(group.prompt_ids) + len(ids)
            if length > limit:
                raise ValueError(
                    f"answer {place + 1}: {length} tokens with its prompt, but the reward model "
                    f"has {limit} positions"
                )
        return group


def is_reward_network(specification: str) -> bool:
    """Return whether a reward is a trained model: a folder, or one in memory."""
    return isinstance(specification, GivenModel) or Path(specification).is_dir()


def load_reward(
    specification: str, compute: Compute | None = None, model: AdapterModel | None = None
) -> RewardFunction:
    """Load a reward: `module:function`, a bag of words (`.json`) or a reward model's folder.

    A function or a model in memory is one, too. Modules are found as Python finds them, and in the
    current folder. `compute` and `model` are as for `ModelReward`, which alone needs them.

    Raises:
        ValueError: if there is no such module or function, or the folder holds no reward model.
        FileNotFoundError: if there is no such file.
        UserCodeFailed: if the module raises an error.
    """
    if isinstance(specification, GivenReward):
        return specification.function
    if specification.endswith(".json"):
        if not Path(specification).is_file():
            raise FileNotFoundError(f"reward: no such file: {specification}")
        return BagOfWordsReward(specification)
    if is_reward_network(specification):
        try:
            return ModelReward(specification, compute, model=model)
        except ValueError as error:  # the option is the reward's, not model.path
            raise ValueError(f"reward: {str(error).removeprefix('model.path: ')}") from error
    module_name, colon, name = specification.partition(":")
    if not colon or not module_name or not name:
        raise ValueError(
            f"reward: expected module:function, a .json file or a folder, got {specification!r}"
        )
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        with user_code(f"reward: {specification}"):
            module = importlib.import_module(module_name)
    except UserCodeFailed as error:
        cause = error.__cause__
        own = isinstance(cause, ModuleNotFoundError) and f"{module_name}.".startswith(
            f"{cause.name}."
        )
        if own:  # else it is a module that the user's own imports
            raise ValueError(f"reward: cannot import {module_name!r}: {cause}") from cause
        raise
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"reward: {module_name!r} has no function {name!r}")
    found: RewardFunction = function
    return found


@dataclass(frozen=True)
class Parameters:
    """The parameters of a reward function beside prompts and completions, by its signature.

    Attributes:
        required: those without a default.
        optional: those with one.
        every: whether it has `**kwargs`.
        by_name: those of `prompts` and `completions` that are given by name, which a signature with
            these names asks for; if it is empty, both are the first two arguments.
        first: names of these two.
    """

    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    every: bool = False
    by_name: tuple[str, ...] = ()
    first: tuple[str, ...] = ()

    def takes(self, column: str) -> bool:
        """Return whether a column is given to the function."""
        named = column in (*self.required, *self.optional)
        return named or (self.every and column not in self.first)


def parameters_of(function: RewardFunction) -> Parameters:
    """Return the parameters of a reward function; none if it has no signature, as some of C."""
    try:
        found = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        return Parameters()
    every = any(p.kind is p.VAR_KEYWORD for p in found)
    named = {p.name for p in found if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    places = [p.name for p in found if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    by_name: tuple[str, ...] = ()
    first = tuple(places[:2])
    if "completions" in named and ("prompts" in named or first[:1] in ((), ("completions",))):
        by_name = ("prompts", "completions") if every or "prompts" in named else ("completions",)
        first = ()
    rest = [p for p in found if p.name in named.difference(by_name, first)]
    required = tuple(p.name for p in rest if p.default is p.empty)
    optional = tuple(p.name for p in rest if p.default is not p.empty)
    return Parameters(required, optional, every, by_name, first)


def columns_of(functions: Mapping[str, RewardFunction]) -> RowColumns:
    """Return the columns of a prompt's row that reward functions take, given by their names."""
    found = {name: parameters_of(function) for name, function in functions.items()}
    required = {column: name for name, p in found.items() for column in p.required}
    optional = {column: name for name, p in found.items() for column in p.optional}
    return RowColumns(
        tuple(sorted(required)),
        tuple(sorted(optional.keys() - required.keys())),
        any(p.every for p in found.values()),
        optional | required,
    )


@contextmanager
def user_code(where: str) -> Iterator[None]:
    """Turn what code of the user's raises, `sys.exit` too, into a UserCodeFailed.

    Its message begins with `where`. A KeyboardInterrupt passes through.
    """
    try:
        yield
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        said = f"sys.exit({error.code!r})" if isinstance(error, SystemExit) else repr(error)
        failed = UserCodeFailed(f"{where}: the code raised {said}")
        frames = error.__traceback__
        while frames is not None and frames.tb_frame.f_code.co_filename == __file__:
            frames = frames.tb_next
        failed.trace = "".join(traceback.format_exception(type(error), error, frames))
        raise failed from error


def apply_reward(
    function: RewardFunction,
    prompts: Sequence[Content],
    completions: Sequence[str],
    source: str | None = None,
    columns: Mapping[str, Sequence[Any]] | None = None,
) -> list[float]:
    """Call a reward function once for all completions, and check its result.

    Args:
        function: (prompts, completions) -> a list, an array or a tensor of one number each, of any
            type that converts to a finite float.
        prompts: one for each completion.
        completions: texts to score.
        source: name of the function in messages.
        columns: a value for each completion by the column's name; the function is given those that
            its signature takes, by name.

    Raises:
        ValueError: if the number of rewards is wrong, or one is not a finite number.
        UserCodeFailed: if a function of the user's raises an error.
    """
    plain, texts = [content_as_json(prompt) for prompt in prompts], list(completions)
    where = "reward" if source is None else f"reward: {source}"
    ours = isinstance(function, ModelReward | BagOfWordsReward)
    ours = ours or getattr(function, "__module__", None) == fastalign.rewards.__name__
    parameters = parameters_of(function)
    given = (columns or {}).items()
    taken = {name: list(values) for name, values in given if parameters.takes(name)}
    both = {"prompts": plain, "completions": texts}
    named = {name: both[name] for name in parameters.by_name}
    with nullcontext() if ours else user_code(where):
        result = function(*(() if named else both.values()), **named, **taken)
    return checked_rewards(result, len(texts), where)


def checked_rewards(result: Any, count: int, where: str) -> list[float]:
    """Return a reward function's result, a sequence, array or tensor (count,), as finite floats.

    Raises:
        ValueError: if it is anything else; the message begins with `where`.
    """
    if isinstance(result, Tensor):
        result = result.detach().cpu()
    shape = getattr(result, "shape", None)
    is_list = isinstance(result, Sequence) and not isinstance(result, str | bytes | bytearray)
    if not is_list and (shape is None or len(shape) != 1):
        found = (
            type(result).__name__ if shape is None else f"{type(result).__name__} {tuple(shape)}"
        )
        raise ValueError(
            f"{where}: expected a list, array or tensor of {count} numbers, one for each "
            f"completion, got {found}"
        )
    values = list(result)
    if len(values) != count:
        raise ValueError(
            f"{where}: expected {count} numbers, one for each completion, got {len(values)}"
        )
    return [finite_number(value, where, row) for row, value in enumerate(values)]


def finite_number(value: Any, where: str, row: int) -> float:
    """Return a number of any type as a float: Python's, numpy's, a tensor's, Decimal, Fraction.

    Raises:
        ValueError: if it is no number, or not finite.
    """
    number = math.nan
    is_text = isinstance(value, str | bytes | bytearray)  # numpy's text would convert
    number_of_two = isinstance(value, numbers.Complex) and not isinstance(value, numbers.Real)
    nested = len(getattr(value, "shape", ())) > 0
    kind = getattr(getattr(value, "dtype", None), "kind", "f")  # M and m of numpy: times
    if hasattr(value, "__float__") and not (is_text or number_of_two or nested or kind in "Mm"):
        with suppress(TypeError, ValueError, OverflowError, RuntimeError):
            number = float(value.detach() if isinstance(value, Tensor) else value)
    if not math.isfinite(number):
        text = repr(value)
        shown = text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}..."
        raise ValueError(f"{where}: expected a finite number, got {shown} (number {row})")
    return number


def source_names(sources: Sequence[str]) -> tuple[str, ...]:
    """Return short, distinct names: a path's last part (`rm` of `.../rm/model`), then a number."""
    short = []
    for source in sources:
        if isinstance(source, InMemory):
            short.append(source.argument)
            continue
        path = Path(source.rstrip("/"))
        named = path.parent if path.name == "model" and path.parent.name else path
        short.append(named.stem if named.suffix == ".json" else named.name)
    count = Counter(short)
    return tuple(
        f"{name}-{number}" if count[name] > 1 else name for number, name in enumerate(short, 1)
    )
