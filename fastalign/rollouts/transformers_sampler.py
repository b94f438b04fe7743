"""The default sampler: it draws in this process, with exact log-probs and a seed per completion.

`TransformersSampler` draws from any model, `PolicySampler` from the one that is being trained.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby, islice
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from fastalign.compute import Compute, require_finite
from fastalign.data.tokenizer import Tokenizer, eos_token_ids
from fastalign.models.architecture import num_positions
from fastalign.models.attention import takes_plans
from fastalign.models.attention.decoding import DecodingPlan
from fastalign.models.exactness import verdict_of
from fastalign.models.forward import row_logits
from fastalign.progress import advance
from fastalign.ranks.whole_weights import with_whole_weights
from fastalign.rollouts.distribution import draw
from fastalign.rollouts.sampler import Completion, SamplingParams, check_prompts, sample_seed

ROWS_PER_BATCH = 256  # completions that are drawn together


class _Draw(LogitsProcessor):  # type: ignore[misc]
    """Logits processor that draws tokens: it returns scores that allow these alone."""

    def __init__(
        self, params: SamplingParams, uniforms: Tensor, on_tokens: Callable[[Tensor], None]
    ):
        self._params = params
        self._uniforms = uniforms
        self._on_tokens = on_tokens
        self.logprobs: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        uniform = self._uniforms[:, len(self.logprobs)]
        token, logprob = draw(scores, self._params, uniform)
        self.logprobs.append(logprob)
        self._on_tokens(token)
        return torch.full_like(scores, -torch.inf).scatter_(1, token[:, None], 0.0)


class TransformersSampler:
    """Sampler that uses a model in this process.

    Args:
        model: a causal model from `load_policy`.
        eos_token_ids: tokens that end a completion.
        pad_token_id: token id of the padding; its logits are never used.
        rows_per_batch: number of completions that are drawn together.
        on_progress: called with the number of completions that are done.
        on_tokens: called with the next token (R,) of R completions that are drawn together, in
            step; what follows a completion's end token is without meaning.
        num_ranks: ranks that draw as many completions each, of a `progress.phase` that is advanced
            by completions, token by token.
    """

    def __init__(
        self,
        model: Any,
        *,
        eos_token_ids: Sequence[int],
        pad_token_id: int,
        rows_per_batch: int = ROWS_PER_BATCH,
        on_progress: Callable[[int], None] | None = None,
        on_tokens: Callable[[Tensor], None] | None = None,
        num_ranks: int = 1,
    ):
        if not eos_token_ids:
            raise ValueError("eos_token_ids: expected at least one token, got none")
        self._model = model
        self._eos = list(eos_token_ids)
        self._pad = pad_token_id
        self._rows_per_batch = rows_per_batch
        self._on_progress = on_progress
        self._on_tokens = on_tokens
        self._num_ranks = num_ranks
        self.version = 0

    def generate(
        self,
        prompt_ids: Sequence[Sequence[int]],
        params: SamplingParams,
        *,
        seed: int,
        first_prompt: int = 0,
    ) -> list[list[Completion]]:
        """Draw `params.num_samples` completions of each prompt, in the prompts' order.

        `first_prompt` is the number of the first prompt among those that several ranks share: any
        number of ranks draws the same tokens.

        Raises:
            ValueError: if a prompt is empty or leaves no room for the answer.
        """
        limit = num_positions(self._model.config)
        check_prompts(prompt_ids, params, limit, self._model.config.get_text_config().vocab_size)
        size, num = self._rows_per_batch, params.num_samples
        found, by_length = verdict_of(self._model), False
        draws = self._draw_packed
        if not (takes_plans(self._model) and found.decodes):
            draws, by_length = self._draw_padded, not found.left_padding
            if not found.generates:
                raise ValueError(
                    "sampler: transformers' generation with this type of model "
                    f"({self._model.config.model_type}) differs from one forward of the whole "
                    "answer; expected vllm or vllm-server (--sampler)"
                )
        results: list[list[Completion]] = [[] for _ in prompt_ids]
        # Prompts of similar length share a batch, which keeps the padding short.
        order = sorted(range(len(prompt_ids)), key=lambda p: (len(prompt_ids[p]), p))
        per_batch = max(1, size // num)
        for chosen in _batches(order, per_batch, prompt_ids if by_length else None):
            prompts = [prompt_ids[p] for p in chosen]
            for first in range(0, num, size):
                samples = range(first, min(first + size, num))
                streams = torch.stack(
                    [
                        _stream(seed, first_prompt + p, s, params.max_new_tokens)
                        for p in chosen
                        for s in samples
                    ]
                ).to(self._model.device)
                tokens, logprobs = draws(prompts, params, streams)
                left = params.max_new_tokens - tokens.shape[1]  # that none of them needed
                self._advance(len(streams), left / params.max_new_tokens)
                require_finite(logprobs, "log-probs of sampled tokens")
                drawn = map(self._cut, tokens.tolist(), logprobs.tolist())
                for p in chosen:
                    results[p] += islice(drawn, len(samples))
                if self._on_progress is not None:
                    self._on_progress(len(streams))
        return results

    def close(self) -> None:
        """Release the model."""
        self._model = None

    def _drawn(self, token: Tensor, params: SamplingParams) -> None:
        """Report the next token (R,) of R completions."""
        if self._on_tokens is not None:
            self._on_tokens(token)
        self._advance(len(token), 1 / params.max_new_tokens)

    def _advance(self, num_completions: int, share: float) -> None:
        """Advance the phase by this share of each of these completions."""
        advance(num_completions * self._num_ranks * share)

    @torch.no_grad()
    def _draw_packed(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, uniforms: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Draw completions; each prompt is computed once, and no token is padding.

        Args:
            prompts: P prompts.
            params: settings.
            uniforms: (R, most new tokens) float64, for each of R / P completions of each prompt.

        Returns:
            Tokens and log-probs, each (R, L). What follows an end token is without meaning.
        """
        device, num_samples = self._model.device, len(uniforms) // len(prompts)
        lengths = torch.tensor([len(ids) for ids in prompts])
        plan = DecodingPlan(lengths.tolist(), num_samples, params.max_new_tokens, device)
        ids = torch.tensor([token for prompt in prompts for token in prompt], device=device)
        places = torch.cat([torch.arange(length) for length in lengths]).to(device)
        last = (lengths.cumsum(0) - 1).to(device)
        logits = row_logits(self._model, ids, places, plan, last)
        logits = logits.repeat_interleave(num_samples, 0)
        places = lengths.to(device).repeat_interleave(num_samples)
        eos = torch.tensor(self._eos, device=device)
        tokens: list[Tensor] = []
        logprobs: list[Tensor] = []
        ended = torch.zeros(len(uniforms), dtype=torch.bool, device=device)
        for uniform in uniforms.unbind(1):
            if tokens:
                logits = row_logits(self._model, tokens[-1], places + len(tokens) - 1, plan)
            token, logprob = draw(logits, params, uniform)
            tokens.append(token)
            logprobs.append(logprob)
            self._drawn(token, params)
            ended |= torch.isin(token, eos)
            if bool(ended.all()):
                break
        return torch.stack(tokens, 1), torch.stack(logprobs, 1)

    @torch.no_grad()
    def _draw_padded(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, uniforms: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Draw as `_draw_packed` does, by transformers' `generate`, from any model."""
        longest = max(len(ids) for ids in prompts)
        padded = [[self._pad] * (longest - len(ids)) + list(ids) for ids in prompts]
        real = [[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts]
        ids, mask = (
            torch.tensor(each, device=self._model.device).repeat_interleave(
                len(uniforms) // len(prompts), 0
            )
            for each in (padded, real)
        )
        draws = _Draw(params, uniforms, lambda token: self._drawn(token, params))
        # Set aside the model's own generation settings, such as penalties or a temperature.
        saved = self._model.generation_config
        self._model.generation_config = GenerationConfig(
            do_sample=False, eos_token_id=self._eos, pad_token_id=self._pad
        )
        try:
            output = self._model.generate(
                ids,
                attention_mask=mask,
                logits_processor=LogitsProcessorList([draws]),
                max_new_tokens=params.max_new_tokens,
                synced_gpus=False,  # a sharded model has been gathered before
            )
        finally:
            self._model.generation_config = saved
        return output[:, longest:], torch.stack(draws.logprobs, 1)

    def _cut(self, tokens: list[int], logprobs: list[float]) -> Completion:
        for place, token in enumerate(tokens):
            if token in self._eos:
                return Completion(tokens[: place + 1], logprobs[: place + 1], "stop", self.version)
        return Completion(tokens, logprobs, "length", self.version)


def _batches(
    order: list[int], size: int, prompt_ids: Sequence[Sequence[int]] | None
) -> Iterator[list[int]]:
    """Yield batches of prompts; with `prompt_ids` each batch's have one length."""
    for _, same in groupby(order, lambda p: 0 if prompt_ids is None else len(prompt_ids[p])):
        members = list(same)
        for start in range(0, len(members), size):
            yield members[start : start + size]


def _stream(seed: int, prompt: int, sample: int, length: int) -> Tensor:
    """Return the uniform numbers of one completion, (length,) float64."""
    generator = torch.Generator()
    generator.manual_seed(sample_seed(seed, prompt, sample))
    return torch.rand(length, generator=generator, dtype=torch.float64)


@contextmanager
def sampling_mode(model: Any, compute: Compute) -> Iterator[None]:
    """Set the model to eval mode, with its products in the run's dtype, while it is sampled from.

    Gradient checkpointing, which forbids a cache of keys and values, is off in eval mode; compiled
    layers run as they were, since a cache of another length would compile them anew.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with compute.autocast(), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for module in training:
            module.training = True


class PolicySampler:
    """The embedded sampler on the policy that is being trained; its weights are always the newest.

    `path` is the model's folder, whose generation settings may list more end tokens.
    """

    def __init__(self, model: Any, tokenizer: Tokenizer, path: str, compute: Compute):
        stops = eos_token_ids(tokenizer, path)
        pad = tokenizer.pad_token_id
        self._model, self._compute = model, compute
        self._sampler = TransformersSampler(
            model,
            eos_token_ids=stops,
            pad_token_id=stops[0] if pad is None else pad,
            num_ranks=compute.world.size,
        )
        self.version = 0

    def generate(
        self, prompt_ids: Sequence[Sequence[int]], params: SamplingParams, *, seed: int
    ) -> list[list[Completion]]:
        """See `Sampler`; several ranks share the prompts, and each gets all completions."""
        self._sampler.version = self.version
        world = self._compute.world
        mine = world.part_of(len(prompt_ids))

        def sample() -> list[list[Completion]]:
            return self._sampler.generate(
                prompt_ids[mine.start : mine.stop], params, seed=seed, first_prompt=mine.start
            )

        with sampling_mode(self._model, self._compute):
            found = with_whole_weights(self._model, sample)
        return [answers for of_rank in world.gather(found) for answers in of_rank]

    def metrics(self) -> dict[str, float | int]:
        """Return no metrics, since there is no engine of its own."""
        return {}

    def close(self) -> None:
        """Release the model."""
        self._sampler.close()
