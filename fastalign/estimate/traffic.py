"""What a step of each algorithm exchanges between ranks: see `fastalign.estimate.scaling`.

Bytes sent are those of a ring, which every rank sends and receives alike; other algorithms move at
least as much.
"""

from dataclasses import dataclass

from fastalign.estimate.scaling import BYTES_OF_FLOAT32, ModelWeights, Sharing, numbers, padded


@dataclass(frozen=True)
class Traffic:
    """Bytes of the whole buffers that ranks exchange: exact.

    Attributes:
        gathered: all-gathers, of weights.
        scattered: reduce-scatters, of gradients.
        reduced: all-reduces, of gradients.
    """

    gathered: int = 0
    scattered: int = 0
    reduced: int = 0

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(
            *(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True))
        )

    def __mul__(self, times: int) -> "Traffic":
        return Traffic(*(times * each for each in vars(self).values()))

    def sent(self, ranks: int) -> int:
        """By each rank, and received by it: all-reduces go around the ring twice."""
        around = self.gathered + self.scattered + 2 * self.reduced
        return -(-around * (ranks - 1) // ranks)


def forward_traffic(model: ModelWeights, sharing: Sharing) -> Traffic:
    """A computation without gradients, and a sampling by transformers, however long."""
    if not sharing.sharded:
        return Traffic()
    return Traffic(gathered=sharing.element * padded(model.all, sharing.ranks))


def gradient_traffic(model: ModelWeights, sharing: Sharing, batches: int) -> Traffic:
    """One gradient: a step of sft, dpo and reward, or an update of PPO's policy or value model.

    Checkpointed activations change nothing: a layer is computed again while it is gathered for
    its backward.

    Args:
        model: that is trained.
        sharing: by how many ranks, and how.
        batches: of a rank.
    """
    ranks, trained = sharing.ranks, model.trained.all
    if not sharing.sharded:
        return Traffic(reduced=BYTES_OF_FLOAT32 * numbers(trained) if ranks > 1 else 0)
    layers = [weight for layer in model.layers for weight in layer]
    again = padded(layers, ranks) if sharing.settings.reshard_after_forward else 0
    reductions = 1 if sharing.settings.no_sync else batches
    return forward_traffic(model, sharing) * batches + Traffic(
        gathered=batches * sharing.element * again,
        scattered=reductions * BYTES_OF_FLOAT32 * padded(trained, ranks),
    )


def sync_traffic(model: ModelWeights, sharing: Sharing) -> Traffic:
    """Weights gathered one by one, as they are kept, for an engine; what it gets is not counted."""
    if not sharing.sharded:
        return Traffic()
    return Traffic(gathered=sum(w.element * padded((w,), sharing.ranks) for w in model.all))


@dataclass(frozen=True)
class PPOModelWeights:
    """The models of a PPO run.

    Attributes:
        policy: is trained.
        reference: is frozen; None where the policy has an adapter.
        value: is trained; None without a value model.
        reward: is frozen; None where the reward is no model.
    """

    policy: ModelWeights
    reference: ModelWeights | None
    value: ModelWeights | None
    reward: ModelWeights | None


@dataclass(frozen=True)
class PPOWork:
    """What a rank computes in a step of PPO.

    Attributes:
        updates: epochs times mini-batches.
        batches: of each update.
        record_batches: of the log-probs and values of what was sampled.
        score_batches: of the reward model.
        samples: whether transformers samples from the policy here; otherwise an engine is synced.
    """

    updates: int
    batches: int
    record_batches: int
    score_batches: int
    samples: bool


def ppo_traffic(models: PPOModelWeights, sharing: Sharing, work: PPOWork) -> Traffic:
    """A step of PPO: sampling, scores, log-probs and values, updates."""
    policy = models.policy
    total = (forward_traffic if work.samples else sync_traffic)(policy, sharing)
    if models.reward is not None:
        total += forward_traffic(models.reward, sharing) * work.score_batches
    for model in (policy, models.reference or policy, models.value):
        if model is not None:
            total += forward_traffic(model, sharing) * work.record_batches
    for trained in (policy, models.value):
        if trained is not None:
            total += gradient_traffic(trained, sharing, work.batches) * work.updates
    return total
