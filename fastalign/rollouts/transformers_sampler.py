"""The default sampler: transformers' `generate`, with exact log-probs and a seed per completion.

`TransformersSampler` draws from any model, `PolicySampler` from the one that is being trained.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.cache_utils import DynamicLayer

from fastalign.compute import Compute, require_finite
from fastalign.data.tokenizer import Tokenizer, eos_token_ids
from fastalign.ranks.whole_weights import with_whole_weights
from fastalign.rollouts.distribution import sampling_logprobs
from fastalign.rollouts.sampler import Completion, SamplingParams, check_prompts, sample_seed


class _Draw(LogitsProcessor):  # type: ignore[misc]
    """Logits processor that draws each row's token from its own stream of uniform numbers.

    It returns scores that allow this token only, and records its log-prob. A row's stream depends
    only on the seed, the prompt's number and the sample's number, so its tokens do not depend on
    the other rows of the batch.
    """

    def __init__(self, params: SamplingParams, uniforms: Tensor):
        self._params = params
        self._uniforms = uniforms  # (rows, max_new_tokens) float64
        self.logprobs: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        logprob = sampling_logprobs(scores, self._params)
        if self._params.temperature == 0:
            token = logprob.argmax(-1, keepdim=True)
        else:
            cumulative = logprob.exp().cumsum(-1, dtype=torch.float64)
            place = self._uniforms[:, len(self.logprobs), None] * cumulative[:, -1:]
            token = torch.searchsorted(cumulative, place, right=True)
            token = token.clamp_(max=logprob.shape[-1] - 1)
        self.logprobs.append(logprob.gather(1, token)[:, 0])
        return torch.full_like(scores, -torch.inf).scatter_(1, token, 0.0)


class _RoomyLayer(DynamicLayer):  # type: ignore[misc]
    """Layer of a cache with room for every new token: a step writes its own and copies no other.

    Args:
        layer: layer that holds the prompts' keys and values.
        rows: (R,) for each completion its prompt's number among those of `layer`.
        num_new: number of tokens that follow.
    """

    def __init__(self, layer: DynamicLayer, rows: Tensor, num_new: int):
        super().__init__()
        self.dtype, self.device, self.is_initialized = layer.dtype, layer.device, True
        self._buffers = []
        for held in (layer.keys, layer.values):  # (prompts, heads, tokens, head size)
            _, heads, length, size = held.shape
            buffer = held.new_empty(len(rows), heads, length + num_new, size)
            torch.index_select(held, 0, rows, out=buffer[:, :, :length])
            self._buffers.append(buffer)
        self.keys, self.values = (buffer[:, :, :length] for buffer in self._buffers)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write new keys and values behind the others; return all of them."""
        start = self.keys.shape[-2]
        stop = start + key_states.shape[-2]
        for buffer, new in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, start:stop] = new
        self.keys, self.values = (buffer[:, :, :stop] for buffer in self._buffers)
        return self.keys, self.values


class TransformersSampler:
    """Sampler that uses a model in this process.

    Args:
        model: a causal model from `load_policy`.
        eos_token_ids: tokens that end a completion.
        pad_token_id: token id of the padding; its logits are never used.
        rows_per_batch: number of completions that are drawn together.
        on_progress: called with the number of completions that are done.
    """

    def __init__(
        self,
        model: Any,
        *,
        eos_token_ids: Sequence[int],
        pad_token_id: int,
        rows_per_batch: int = 256,
        on_progress: Callable[[int], None] | None = None,
    ):
        if not eos_token_ids:
            raise ValueError("eos_token_ids: expected at least one token, got none")
        self._model = model
        self._eos = list(eos_token_ids)
        self._pad = pad_token_id
        self._rows_per_batch = rows_per_batch
        self._on_progress = on_progress
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
        limit = getattr(self._model.config, "max_position_embeddings", None)
        check_prompts(prompt_ids, params, limit, self._model.config.get_text_config().vocab_size)
        rows = [(p, s) for p in range(len(prompt_ids)) for s in range(params.num_samples)]
        # Prompts of similar length share a batch, which keeps the padding short.
        rows.sort(key=lambda row: (len(prompt_ids[row[0]]), row))
        results: dict[tuple[int, int], Completion] = {}
        for start in range(0, len(rows), self._rows_per_batch):
            part = rows[start : start + self._rows_per_batch]
            length = params.max_new_tokens
            streams = torch.stack([_stream(seed, first_prompt + p, s, length) for p, s in part])
            drawn = self._batch(prompt_ids, [p for p, _ in part], params, streams)
            results.update(zip(part, drawn, strict=True))
            if self._on_progress is not None:
                self._on_progress(len(part))
        return [[results[p, s] for s in range(params.num_samples)] for p in range(len(prompt_ids))]

    def close(self) -> None:
        """Release the model."""
        self._model = None

    @torch.no_grad()
    def _batch(
        self,
        prompt_ids: Sequence[Sequence[int]],
        numbers: Sequence[int],
        params: SamplingParams,
        uniforms: Tensor,
    ) -> list[Completion]:
        """Draw a completion of each of the prompts with these numbers."""
        distinct = sorted(set(numbers))
        prompts = [prompt_ids[number] for number in distinct]
        longest = max(len(ids) for ids in prompts)
        device = self._model.device
        padded = [[self._pad] * (longest - len(ids)) + list(ids) for ids in prompts]
        real = [[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts]
        ids, mask = (torch.tensor(each, device=device) for each in (padded, real))
        rows = torch.tensor([distinct.index(number) for number in numbers], device=device)
        draw = _Draw(params, uniforms.to(device))
        # Set aside the model's own generation settings, such as penalties or a temperature.
        saved = self._model.generation_config
        self._model.generation_config = GenerationConfig(
            do_sample=False, eos_token_id=self._eos, pad_token_id=self._pad
        )
        try:
            output = self._model.generate(
                ids[rows],
                attention_mask=mask[rows],
                past_key_values=self._prefill(ids, mask, rows, params.max_new_tokens),
                logits_processor=LogitsProcessorList([draw]),
                max_new_tokens=params.max_new_tokens,
                synced_gpus=False,  # a sharded model has been gathered before
            )
        finally:
            self._model.generation_config = saved
        tokens = output[:, longest:].tolist()
        drawn = torch.stack(draw.logprobs, dim=1)
        require_finite(drawn, "log-probs of sampled tokens")
        logprobs = drawn.tolist()
        return [self._cut(*row) for row in zip(tokens, logprobs, strict=True)]

    def _prefill(self, ids: Tensor, mask: Tensor, rows: Tensor, num_new: int) -> Cache | None:
        """Compute each prompt's keys and values but its last token's, once for all completions.

        Returns:
            The cache of all completions; None where there is nothing to share, or where the model
            keeps its state in another way.
        """
        if ids.shape[1] == 1:
            return None
        found = self._model.generate(
            ids[:, :-1],
            attention_mask=mask[:, :-1],
            max_new_tokens=1,
            return_dict_in_generate=True,
            synced_gpus=False,
        )
        cache = found.get("past_key_values")
        if cache is None:
            return None
        for number, layer in enumerate(cache.layers):
            if type(layer) is DynamicLayer and layer.is_initialized:
                cache.layers[number] = _RoomyLayer(layer, rows, 1 + num_new)
            else:  # such as that of a sliding window, which holds no more than it needs
                layer.reorder_cache(rows)
        return cache

    def _cut(self, tokens: list[int], logprobs: list[float]) -> Completion:
        for place, token in enumerate(tokens):
            if token in self._eos:
                return Completion(tokens[: place + 1], logprobs[: place + 1], "stop", self.version)
        return Completion(tokens, logprobs, "length", self.version)


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
    training = model.training
    model.eval()
    try:
        with compute.autocast(), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        model.train(training)


class PolicySampler:
    """The embedded sampler on the policy that is being trained; its weights are always the newest.

    `path` is the model's folder, whose generation settings may list more end tokens.
    """

    def __init__(self, model: Any, tokenizer: Tokenizer, path: str, compute: Compute):
        stops = eos_token_ids(tokenizer, path)
        pad = tokenizer.pad_token_id
        self._model, self._compute = model, compute
        self._sampler = TransformersSampler(
            model, eos_token_ids=stops, pad_token_id=stops[0] if pad is None else pad
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
