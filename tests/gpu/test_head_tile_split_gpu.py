"""The split passes over a tile, and a vocabulary shared by a group of one, on a GPU."""

import dataclasses
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from fastalign import VocabularyShard, linear_logprob
from fastalign.ops.backends import unusable_reason
from tests.ops.head.head_tile.head_tile_cases import (
    TRANSFORMS,
    UPSTREAMS,
    products,
    run,
    transform_of,
)
from tests.ops.head.head_tile.test_head_tile_split import (
    NAMES,
    borders,
    gradient,
    statistics,
    whole_softmax,
)
from tests.tolerance import assert_no_worse

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        os.environ.get("FASTALIGN_TEST_GPU") != "1" or not torch.cuda.is_available(),
        reason="needs a GPU, and FASTALIGN_TEST_GPU=1 (scripts/gpu_check.sh)",
    ),
]
SHAPES = [(1, 1), (5, 63), (9, 4096), (4, 128_256), (3, 128_257)]


@pytest.mark.parametrize("backend", ["native", "triton"])
@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_both_passes_are_no_worse_than_eager(
    backend: str, shape: tuple[int, int], name: str
) -> None:
    reason = unusable_reason(backend, "cuda", torch.float32)
    if reason is not None:
        pytest.skip(reason)
    tile, targets, ignored = (value.cuda() for value in products(*shape))
    transform = transform_of(name, shape[0])
    if transform.temperature is not None:
        transform = dataclasses.replace(transform, temperature=transform.temperature.cuda())
    known = whole_softmax(tile, targets, ignored, transform)
    common = {"dtype": torch.float32, "length": shape[1]}
    for start, stop in borders(shape[1]):
        arguments = (targets - start, ignored, transform)
        part = tile[:, start:stop].contiguous()
        found = statistics(part, *arguments, backend)
        plain, true = statistics(part, *arguments), statistics(part.double(), *arguments)
        for value in NAMES:
            ours, theirs, truth = (getattr(one, value).cpu() for one in (found, plain, true))
            assert_no_worse(value, ours, theirs, truth, scale=30.0, **common)
        for upstream in UPSTREAMS:
            _, truth = run(tile.double(), targets, ignored, transform, upstream)
            ours = gradient(part.clone(), *arguments, known, upstream, backend)
            theirs = gradient(part.clone(), *arguments, known, upstream)
            everyones = (ours.cpu(), theirs.cpu(), truth[:, start:stop].cpu())
            assert_no_worse("gradient", *everyones, scale=1.0, **common)
        found = statistics(part, (part.argmax(1)), ignored, transform, backend)
        assert torch.equal(found.maximum, found.target)


@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.bfloat16])
def test_a_group_of_one_through_nccl(compute_dtype: torch.dtype, tmp_path: Path) -> None:
    rendezvous = f"file://{tmp_path}/rendezvous"
    dist.init_process_group("nccl", init_method=rendezvous, rank=0, world_size=1)
    try:
        shard, found = VocabularyShard.even(None, 4096), []
        for vocabulary_shard in (shard, None):
            generator = torch.Generator("cuda").manual_seed(3)
            hidden, weight = (
                torch.randn(rows, 256, device="cuda", generator=generator).div_(4).requires_grad_()
                for rows in (300, 4096)
            )
            targets = torch.arange(300, device="cuda") * 7
            logprob, entropy = linear_logprob(
                hidden,
                weight,
                targets,
                return_entropy=True,
                compute_dtype=compute_dtype,
                max_buffer_bytes=2**21,
                vocabulary_shard=vocabulary_shard,
            )
            (logprob.sum() + 0.3 * entropy.square().sum()).backward()
            found.append((logprob, entropy, hidden.grad, weight.grad))
    finally:
        dist.destroy_process_group()
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-3)
