"""Verdicts on models: whether their batches are exact, measured on a small copy, read off no list.

A small copy of the configuration, with random weights, computes log-probs (or scores) and their
gradients of a few sequences one at a time by transformers' own forward, then as a packed row and as
a padded rectangle. The lengths cross its sliding window and the range of its rotary embedding; the
logits are large enough for a softcap or a scale to show. How many attention layers used the packed
row's plan is counted, since a layer may drop it. The result is kept in the cache folder.
"""

import hashlib
import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    GenerationConfig,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as CLASSIFIERS,
)
from transformers.utils import logging

from fastalign.batch.packed import Group, PackedBatch, pack
from fastalign.choices import Packing
from fastalign.compute import Compute
from fastalign.model_files import reason_of
from fastalign.models import attention
from fastalign.models.architecture import auto_class, backbone, disable_dropout, rope_limit
from fastalign.models.attention.decoding import DecodingPlan
from fastalign.models.attention.plan import AttentionPlan
from fastalign.models.forward import response_logprob, row_logits
from fastalign.models.layers import skip_unread_tokens
from fastalign.models.reward import response_reward
from fastalign.models.shrink import FEW_POSITIONS, small_values
from fastalign.written_files import cache_folder, write_atomically

Kind = Literal["packed", "padded", "refused"]
# Largest difference of a log-prob in nats, and of a gradient, relative to its parameter's largest:
# float32 rounding stays below 1e-4 of either, and what is computed wrongly above 1e-2.
TOLERANCE = 1e-3
Lengths = tuple[tuple[int, tuple[int, ...]], ...]
# Tokens of prompts and their responses: both sides of the window and of FEW_POSITIONS.
LENGTHS: Lengths = ((7, (11, 3)), (2, (5,)), (12, (9,)))
SHORT: Lengths = ((7, (9, 3)), (2, (5,)))
LONG: Lengths = ((FEW_POSITIONS, (9, 3)), (FEW_POSITIONS + 3, (5,)))


@dataclass(frozen=True)
class Verdict:
    """Result of measuring a small copy of a model.

    Attributes:
        packed: why packed rows are not exact; empty: they are.
        padded: why padded rectangles are not; empty: they are.
        difference: largest difference in the exact layouts.
        gradient: largest difference of a gradient there, relative to its parameter's largest.
        attends: number of calls of attention that used a packed row's plan.
        layers: number of layers.
        needs: what its attention needs beside the usual: softcap, sinks, value_width.
        skips: True if the last layer's MLP may leave out the tokens that nothing reads.
        decodes: True if completions can be drawn by the packed forward.
        generates: True if transformers can.
        left_padding: True if it can for prompts of several lengths at once.
    """

    packed: str
    padded: str
    difference: float
    gradient: float
    attends: int
    layers: int
    needs: tuple[str, ...]
    skips: bool
    decodes: bool
    generates: bool
    left_padding: bool

    @property
    def kind(self) -> Kind:
        """Kind of the better of the layouts that are exact."""
        return "packed" if not self.packed else "padded" if not self.padded else "refused"


def verdict(config: Any, *, reward: bool, trust_remote_code: bool = False) -> Verdict:
    """Return what a model of this configuration can do; measured once, then remembered."""
    try:
        small = small_config(config)
    except Exception as error:  # whatever a configuration's own checks raise
        return no_verdict(error)
    key = key_of(small, reward)
    if key not in _known:
        path = cache_folder("exactness") / f"{key}.json"
        with suppress(OSError, ValueError, TypeError):  # none, or damaged: it is measured again
            found = json.loads(path.read_text(encoding="utf-8"))
            _known[key] = Verdict(**found | {"needs": tuple(found["needs"])})
        if key not in _known:
            _known[key] = measure(small, reward=reward, trust_remote_code=trust_remote_code)
            with suppress(OSError):  # without a cache folder each start measures
                path.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(path, json.dumps(asdict(_known[key])))
    return _known[key]


def verdict_of(model: Any) -> Verdict:
    """Return the verdict on a causal model: the one that it was loaded under, if it was."""
    found: Verdict | None = model.__dict__.get("verdict")
    return verdict(model.config, reward=False) if found is None else found


_known: dict[str, Verdict] = {}  # by `key_of`; of this process


@cache
def versions() -> tuple[str, ...]:
    """Return what a verdict depends on beside the configuration: libraries, and our own code."""
    package = Path(__file__).parent
    files = [*sorted(package.rglob("*.py")), *sorted((package.parent / "batch").glob("*.py"))]
    code = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    return *(version(library) for library in ("transformers", "torch", "fastalign")), code


def key_of(small: Any, reward: bool) -> str:
    """Return the name under which a verdict is remembered."""
    values = {**small.to_dict(), "_name_or_path": None, "dtype": None, "architectures": None}
    name = getattr(auto_class(small), "__name__", None)
    text = json.dumps([values, reward, name, versions()], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def small_config(config: Any) -> Any:
    """Return the configuration of a small copy."""
    small = type(config).from_dict(small_values(config.to_dict()))
    small._name_or_path = config._name_or_path
    return small


def check_exact(
    config: Any, packing: Packing, *, reward: bool, trust_remote_code: bool = False
) -> Verdict:
    """Return the verdict on a model.

    Raises:
        ValueError: if batches of this packing are not exact; with the measured difference.
    """
    found = verdict(config, reward=reward, trust_remote_code=trust_remote_code)
    what = f"model.path: a {'reward' if reward else 'causal'} model of type {config.model_type!r}"
    if found.kind == "refused":
        raise ValueError(f"{what} cannot be computed exactly: {found.padded}")
    way, other, reason = ("packed", "padded", found.packed)
    if packing == "padded":
        way, other, reason = ("padded", "shared_prefix", found.padded)
    if reason:
        raise ValueError(
            f"{what} cannot be {way} exactly: {reason}; use packing: auto or {other} "
            "(--train.packing, in eval --packing)"
        )
    return found


def known_verdicts() -> dict[str, Verdict]:
    """Return what this process remembers: another rank adds it to its own."""
    return _known


def measure(small: Any, *, reward: bool, trust_remote_code: bool = False) -> Verdict:
    """Measure a small copy: packed rows and padded rectangles against one sequence at a time."""
    with apart():
        try:
            model = small_model(small, reward, trust_remote_code)
            batches = [pack(groups) for groups in groups_of(small)]
            expected = [one_at_a_time(model, batch, reward) for batch in batches]
            check_causal(model, batches[0], reward)
        except Exception as error:  # whatever a family's code raises is why it is refused
            return no_verdict(error)
        plans = [AttentionPlan(batch, is_trial=True) for batch in batches]

        def difference(packing: Packing, implementation: str) -> tuple[str, float, float]:
            try:
                model.set_attn_implementation(implementation)
                found = [
                    batch_values(model, batch, packing, plan, reward)
                    for batch, plan in zip(batches, plans, strict=True)
                ]
            except Exception as error:
                return reason_of(error), 0.0, 0.0
            return compare(found, expected)

        ours = attention.registered_name("sdpa")
        hooks = skip_unread_tokens(model)
        packed = difference("shared_prefix", ours)
        skips = bool(hooks) and not packed[0]
        if hooks and not skips:
            remove(hooks, plans)
            packed = difference("shared_prefix", ours)
        attends = sum(plan.num_attended for plan in plans) // len(plans)
        if attends == 0:
            packed = (f"no attention layer uses the packed row's plan; {packed[0]}", 0.0, 0.0)
        padded = difference("padded", model.fastalign_own_attention if packed[0] else ours)
        exact = [each for each in (packed, padded) if not each[0]]
        decodes = not packed[0] and not reward and decoding_is_exact(model, batches[0])
        return Verdict(
            packed[0],
            padded[0],
            max((each[1] for each in exact), default=0.0),
            max((each[2] for each in exact), default=0.0),
            attends,
            getattr(small.get_text_config(), "num_hidden_layers", 0),
            tuple(sorted({need for plan in plans for need in plan.needs})),
            skips,
            decodes,
            *(
                decodes or (not reward and generation_is_exact(model, batches[0], num))
                for num in (0, 3)
            ),
        )


def remove(hooks: Sequence[Any], plans: Sequence[AttentionPlan]) -> None:
    """Remove hooks, and forget what was counted under them."""
    for hook in hooks:
        hook.remove()
    for plan in plans:
        plan.num_attended = 0


@torch.no_grad()
def check_causal(model: Any, batch: PackedBatch, reward: bool) -> None:
    """Raise ValueError if a token's logits depend on later tokens; a score is of a last token."""
    ids = batch.input_ids[None, : batch.layout.prompt_bounds[0][1]]
    backbone_of = backbone(model) if reward else model
    whole, part = (backbone_of(input_ids=each, use_cache=False)[0] for each in (ids, ids[:, :-2]))
    if float((whole[:, :-2] - part).abs().max()) > TOLERANCE:
        raise ValueError("what it computes of a token depends on later tokens")


@torch.no_grad()
def decoding_is_exact(model: Any, batch: PackedBatch) -> bool:
    """Return True if a plan that keeps keys gives the logits of the whole sequences."""
    (first, stop), tokens = batch.layout.prompt_bounds[0], batch.input_ids
    prompts = [tokens[first:stop], tokens[first : first + 2]]
    rows = [torch.cat([prompt, tokens[-4:]]) for prompt in prompts]
    lengths = [len(prompt) for prompt in prompts]
    plan = DecodingPlan(lengths, 1, 4, tokens.device)
    ids, places = torch.cat(prompts), torch.cat([torch.arange(length) for length in lengths])
    try:
        row_logits(model, ids, places, plan)
        for step in range(4):
            newest = torch.stack([row[step - 4] for row in rows])
            ours = row_logits(model, newest, torch.tensor(lengths) + step, plan)
    except Exception:  # transformers' own generation then draws
        return False
    theirs = torch.cat([model(input_ids=row[None], use_cache=False).logits[:, -1] for row in rows])
    return float((ours - theirs).abs().max()) <= TOLERANCE


@torch.no_grad()
def generation_is_exact(model: Any, batch: PackedBatch, num_padding: int) -> bool:
    """Return True if transformers' `generate` behind padding has the logits of whole sequences."""
    length = 3
    ids = torch.cat([torch.full((num_padding,), 3), batch.input_ids[:length]])[None]
    settings = GenerationConfig(
        max_new_tokens=12,
        do_sample=False,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    mask = torch.ones_like(ids)
    mask[:, :num_padding] = 0
    try:
        found = model.generate(ids, attention_mask=mask, generation_config=settings)
        sequence = found.sequences[:, num_padding:]
        whole = model(input_ids=sequence, use_cache=False).logits[0, length - 1 : -1]
        return float((torch.cat(found.logits) - whole).abs().max()) <= TOLERANCE
    except Exception:  # it cannot generate
        return False


def no_verdict(error: Exception) -> Verdict:
    """Return the verdict on a model of which no small copy runs."""
    why = f"a small copy, by its config.json, fails: {reason_of(error)}"
    return Verdict(why, why, 0.0, 0.0, 0, 0, (), False, False, False, False)


@contextmanager
def apart() -> Iterator[None]:
    """Compute on the CPU with gradients, in float32, and leave no trace in the process."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    with (
        torch.random.fork_rng(devices=[]),
        torch.device("cpu"),
        torch.enable_grad(),
        torch.autocast("cpu", enabled=False),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        torch.default_generator.manual_seed(0)  # `torch.manual_seed` would seed GPUs too
        try:
            yield
        finally:
            logging.set_verbosity(before)


def small_model(small: Any, reward: bool, trust_remote_code: bool) -> Any:
    """Return a random model under eager attention: others may leave out a softcap."""
    small.num_labels = 1
    auto = AutoModelForSequenceClassification if reward else auto_class(small)
    options = {"dtype": torch.float32, "trust_remote_code": trust_remote_code}
    attention.register()
    if small.is_encoder_decoder:
        raise ValueError("it has an encoder beside its decoder")
    own_code = auto.__name__ in (getattr(small, "auto_map", None) or {})
    if reward and small.model_type not in CLASSIFIERS and not own_code:
        raise ValueError("transformers has no sequence classifier of this type")
    model = auto.from_config(deepcopy(small), **options)
    model.fastalign_own_attention = model.config._attn_implementation
    model.set_attn_implementation("eager")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=2 * parameter.shape[-1] ** -0.5)
            else:  # norms stay near what they are
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        head = None if reward else model.get_output_embeddings()
        if head is not None:
            head.weight *= 4
    disable_dropout(model)
    return model.eval()


def groups_of(small: Any) -> list[list[Group]]:
    """Return the batches of the measurement: one for each range of a rope that has several."""
    batches = [LENGTHS]
    if (limit := rope_limit(small)) is not None:
        batches = [SHORT, LONG] if limit.has_long else [SHORT]
    last = small.get_text_config().vocab_size - 3
    found, token = [], 0
    for lengths in batches:
        groups = []
        for num_prompt, responses in lengths:
            parts = []
            for length in (num_prompt, *responses):
                # 3 and above are no special tokens of the small copy
                parts.append([3 + (token + 7 * place) % last for place in range(length)])
                token += 5
            groups.append(Group(parts[0], parts[1:]))
        found.append(groups)
    return found


def one_at_a_time(model: Any, batch: PackedBatch, reward: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """Return transformers' log-probs or scores of each sequence alone, and their gradients."""
    layout, values = batch.layout, []
    for (start, stop), prompt in zip(layout.response_bounds, layout.response_prompt, strict=True):
        first, last = layout.prompt_bounds[prompt]
        ids = torch.cat([batch.input_ids[first:last], batch.input_ids[start:stop]])[None]
        logits = model(input_ids=ids, use_cache=False).logits
        if reward:
            values.append(logits.flatten())
            continue
        logprob = logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        values.append(logprob[last - first - 1 :])
    return gradients(model, torch.cat(values))


def batch_values(
    model: Any, batch: PackedBatch, packing: Packing, plan: AttentionPlan, reward: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return our log-probs or scores of a batch, and their gradients."""
    compute = Compute(packing=packing)
    values = (response_reward if reward else response_logprob)(model, batch, compute, plan)
    return gradients(model, values)


def gradients(model: Any, values: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the values, and the gradient of a weighted sum of them by each parameter's name."""
    model.zero_grad(set_to_none=True)
    torch.autograd.backward(values @ torch.linspace(-1, 1, len(values) + 1)[1:])
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return values.detach(), found


def compare(
    found: Sequence[tuple[Tensor, dict[str, Tensor]]],
    expected: Sequence[tuple[Tensor, dict[str, Tensor]]],
) -> tuple[str, float, float]:
    """Return in what values and gradients differ, or an empty text, and the two differences."""
    values, slopes = 0.0, 0.0
    for (ours, of_ours), (theirs, of_theirs) in zip(found, expected, strict=True):
        if not bool(theirs.isfinite().all()):
            return (
                "a small copy, by its config.json, computes numbers that are not finite",
                0.0,
                0.0,
            )
        values = max(values, float((ours - theirs).abs().nan_to_num(nan=float("inf")).max()))
        floor = 1e-3 * max(float(g.abs().max()) for g in of_theirs.values())
        for name in of_ours.keys() | of_theirs.keys():
            one = of_ours.get(name, torch.zeros(()))
            other = of_theirs.get(name, torch.zeros(()))
            scale = max(float(other.abs().max()), floor)
            slopes = max(slopes, float((one - other).abs().max()) / scale)
    if values <= TOLERANCE and slopes <= TOLERANCE:
        return "", values, slopes
    return (
        f"a small copy's values differ from one sequence at a time by up to {values:.2g}, its "
        f"gradients by up to {slopes:.2g} of their largest entry",
        values,
        slopes,
    )
