"""A policy's weights for an engine: names, shapes, checks, and files."""

import copy
import hashlib
import os
import shutil
import socket
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastalign.models.architecture import auto_class
from fastalign.models.lora import dense_state
from fastalign.models.lora_files import WEIGHTS_FILE
from fastalign.models.reward import VALUE_HEAD
from fastalign.ranks.whole_weights import whole
from fastalign.rollouts.engines.supervise import SYNC_PREFIX
from fastalign.written_files import ADAPTER_CONFIG

NamedTensors = Iterable[tuple[str, Tensor]]
Shapes = dict[str, tuple[int, ...]]
WORDS_PER_ROW = 2**16  # of `hash_bits`: 256 KiB, which stay in a core's cache
ADAPTER_FILES = (WEIGHTS_FILE, ADAPTER_CONFIG)


def shapes_of_config(config: Any) -> Shapes:
    """Return name to shape of a causal model's tensors, from its configuration alone."""
    return {name: tuple(tensor.shape) for name, tensor in _skeleton(config).state_dict().items()}


def write_config(config: Any, folder: str | Path) -> None:
    """Write `config.json` for an engine, with the architecture of a causal model."""
    described = copy.deepcopy(config)
    # Engines choose the model by this field, which may name a base model's class, or none.
    described.architectures = [architecture_of(config)]
    described.save_pretrained(folder)


def architecture_of(config: Any) -> str:
    """Return the name of the class of a causal model with this configuration."""
    return type(_skeleton(config)).__name__


def _skeleton(config: Any) -> Any:
    with torch.device("meta"):
        return auto_class(config).from_config(config)


def tolerance_of(dtype: torch.dtype) -> float:
    """Return the tolerance for a layer's outputs in this dtype, as a share of the largest."""
    return 2**-10 if dtype == torch.float32 else 2**-4


def policy_tensors(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor by its name in a checkpoint; sharded ones are not gathered.

    Adapters and a value head are left out. A tied head comes under its own name too, for engines
    that keep a copy.
    """
    return (
        (name, tensor.detach())
        for name, tensor in dense_state(model)
        if not name.startswith(f"{VALUE_HEAD}.")
    )


def fit_tensors(named_tensors: NamedTensors, expected: Shapes) -> dict[str, Tensor]:
    """Return all tensors, neither copied nor gathered, after checking them against an engine's.

    Raises:
        ValueError: if one is missing, unknown, of another shape or not finite; names the first.
    """
    tensors = dict(named_tensors)
    check_shapes({name: tuple(tensor.shape) for name, tensor in tensors.items()}, expected)
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(whole(torch.isfinite(tensor).all())):
            raise ValueError(f"sync_weights: {name} holds a non-finite weight")
    return tensors


def check_shapes(got: Mapping[str, tuple[int, ...]], expected: Shapes) -> None:
    """Check that the tensors have the names and shapes of an engine's.

    Raises:
        ValueError: if one is missing, unknown or of another shape; names the first.
    """
    for name in sorted(expected.keys() | got.keys()):
        if name not in got:
            raise ValueError(f"sync_weights: {name} is missing")
        if name not in expected:
            raise ValueError(f"sync_weights: the engine's model has no tensor {name}")
        if got[name] != expected[name]:
            raise ValueError(
                f"sync_weights: {name}: expected shape {expected[name]}, got {got[name]}"
            )


@dataclass(frozen=True)
class EngineDtypes:
    """The dtypes of an engine's weights, to which a policy's are rounded before they are sent.

    Attributes:
        dtype: dtype of nearly all of them.
        wide: last two parts of the names (`gate.weight`) of those that are float32 in any case.
    """

    dtype: torch.dtype
    wide: frozenset[str] = frozenset()

    def of(self, name: str, tensor: Tensor) -> torch.dtype:
        """Return the dtype in which a tensor is sent: the engine's where that is the smaller."""
        kept = not tensor.is_floating_point() or ending(name) in self.wide
        return tensor.dtype if kept or self.dtype.itemsize >= tensor.itemsize else self.dtype

    def of_all(self, other: "EngineDtypes") -> "EngineDtypes":
        """Return the dtypes that suit this engine and another."""
        larger = max(self.dtype, other.dtype, key=lambda dtype: dtype.itemsize)
        return EngineDtypes(larger, self.wide | other.wide)

    def gathered(self, named_tensors: NamedTensors) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors rounded, where they are, and then gathered (`whole`)."""
        for name, tensor in named_tensors:
            yield name, whole(tensor.to(self.of(name, tensor)))


def ending(name: str) -> str:
    """Return the last two parts of a tensor's name; engines may call what is before otherwise."""
    return ".".join(name.replace(".base_layer.", ".").split(".")[-2:])


def wide_names(engine_model: Any) -> list[str]:
    """Return the endings of the names of an engine's float32 parameters and buffers."""
    named = [*engine_model.named_parameters(), *engine_model.named_buffers()]
    return sorted({ending(name) for name, tensor in named if tensor.dtype == torch.float32})


def to_host(tensor: Tensor) -> Tensor:
    """Copy a tensor to host memory, contiguous; from a GPU to pinned memory, at the bus's speed."""
    if not tensor.is_cuda:
        return tensor.to("cpu", copy=True).contiguous()
    # torch keeps the pinned memory of one tensor for the next.
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor)


def accepted_by(engine_model: Any, tensors: NamedTensors) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors, without the head if the engine's model has none beside its embedding."""
    has_head = any(name.endswith("lm_head") for name, _ in engine_model.named_modules())
    return (pair for pair in tensors if has_head or not pair[0].startswith("lm_head."))


def hash_bits(tensor: Tensor) -> int:
    """Return a hash of a tensor's bits, 64 bits, the same on every device.

    It is the sum of the 32-bit words times fixed odd 64-bit numbers, modulo 2**64: one pass at
    about a gigabyte a second on a core, and without a copy to the host on a GPU. It finds faults,
    not attacks.
    """
    flat = tensor.detach().contiguous().flatten().view(torch.uint8)
    if (missing := -flat.numel() % 4) or flat.storage_offset() % 4:
        flat = F.pad(flat, (0, missing)).clone()
    words = flat.view(torch.int32)
    num_rows = words.numel() // WORDS_PER_ROW
    whole_rows, last = words[: num_rows * WORDS_PER_ROW], words[num_rows * WORDS_PER_ROW :]
    of_columns = _multipliers(WORDS_PER_ROW, flat.device)
    # Rows at a time: a GPU takes many, a CPU as many as it has threads.
    at_a_time = 64 if flat.is_cuda else torch.get_num_threads()
    sums = [
        (rows * of_columns).sum(1)
        for rows in torch.split(whole_rows.view(-1, WORDS_PER_ROW), at_a_time)
    ]
    sums.append((last * of_columns[: len(last)]).sum()[None])
    total = (torch.cat(sums) * _multipliers(num_rows + 1, flat.device)).sum()
    return int(total) & (2**64 - 1)


def _multipliers(number: int, device: torch.device) -> Tensor:
    """Return the first fixed odd 64-bit numbers, (number,): the bits of the counts, mixed."""
    mixed = torch.arange(1, number + 1, device=device) * -7046029254386353131
    mixed = (mixed ^ (mixed >> 29)) * -4658895280553007687
    mixed = (mixed ^ (mixed >> 32)) * -7723592293110705685
    return (mixed ^ (mixed >> 32)) | 1


class Tally:
    """Count and hash of the tensors that pass through it; their order does not matter."""

    def __init__(self) -> None:
        self.number = 0
        self._lines: list[str] = []

    def through(self, named_tensors: NamedTensors) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors, each counted and hashed (`hash_bits`) with its name and type."""
        for name, tensor in named_tensors:
            kind = f"{tensor.dtype} {list(tensor.shape)}"
            self._lines.append(f"{name} {kind} {hash_bits(tensor):016x}")
            self.number += 1
            yield name, tensor

    @property
    def digest(self) -> str:
        """Hash of all tensors so far, 16 hexadecimal digits; an empty text if there were none."""
        if not self._lines:
            return ""
        return hashlib.sha256("\n".join(sorted(self._lines)).encode()).hexdigest()[:16]

    def answer(self) -> dict[str, Any]:
        """Return count and hash for JSON."""
        return {"number": self.number, "digest": self.digest}


def tally_adapter(folder: str | Path) -> Tally:
    """Return the count and hash of the files of an adapter in a folder."""
    contents = {
        name: torch.frombuffer(bytearray(Path(folder, name).read_bytes()), dtype=torch.uint8)
        for name in ADAPTER_FILES
        if Path(folder, name).is_file()
    }
    tally = Tally()
    list(tally.through(contents.items()))
    return tally


def sync_folder(parent: str | None, num_bytes: int = 0) -> "tempfile.TemporaryDirectory[str]":
    """Make a folder for weights: in `parent`, or else in memory (/dev/shm) if they fit there.

    Folders that killed processes of this machine left there are removed.
    """
    memory = Path("/dev/shm")
    fits = memory.is_dir() and shutil.disk_usage(memory).free > num_bytes
    chosen = Path(parent or (memory if fits else tempfile.gettempdir()))
    here = f"{SYNC_PREFIX}{socket.gethostname()}-"
    for left in chosen.glob(f"{here}*"):
        process = left.name.removeprefix(here).partition("-")[0]
        if not Path(f"/proc/{process}").exists() and Path("/proc/self").exists():
            shutil.rmtree(left, ignore_errors=True)
    return tempfile.TemporaryDirectory(prefix=f"{here}{os.getpid()}-", dir=chosen)


def write_tensors(tensors: NamedTensors, folder: Path, *, part_bytes: int = 2**28) -> None:
    """Write safetensors files of about `part_bytes`, which bounds the memory for copies."""
    part: dict[str, Tensor] = {}
    size = number = 0
    for name, tensor in tensors:
        # Copied, since safetensors refuses tied tensors, which share storage.
        part[name] = to_host(whole(tensor))
        size += tensor.numel() * tensor.element_size()
        if size >= part_bytes:
            save_file(part, folder / f"part-{number:05d}.safetensors")
            part, size, number = {}, 0, number + 1
    if part:
        save_file(part, folder / f"part-{number:05d}.safetensors")


def read_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors that `write_tensors` wrote, in order, memory-mapped."""
    for path in sorted(folder.glob("part-*.safetensors")):
        with safe_open(path, framework="pt", device="cpu") as file:
            for name in file.keys():  # noqa: SIM118 (no dictionary)
                yield name, file.get_tensor(name)


def differing_tensors(
    engine_model: Any, tensors: NamedTensors, *, tolerance: float
) -> tuple[list[str], int]:
    """Find the weights that an engine's model does not compute with, by its layers' outputs.

    An engine may store a linear layer's weight in a packed form, or several in one. So each linear
    layer is applied to a fixed vector, and its output is compared with the product. Embeddings and
    norms are compared directly.

    Args:
        engine_model: vLLM's model, not split over ranks, whose layers have the checkpoint's names
            or are listed in its `packed_modules_mapping`.
        tensors: the weights it should compute with.
        tolerance: largest difference, as a share of the largest entry.

    Returns:
        The names that differ, in the order of the tensors, and how many were compared.
    """
    expected = {name: whole(tensor).cpu() for name, tensor in tensors}
    packed: dict[str, Sequence[str]] = getattr(engine_model, "packed_modules_mapping", {})
    differing: set[str] = set()
    num_compared = 0
    for wrapped_name, module in engine_model.named_modules():
        if hasattr(module, "base_layer"):  # an adapter's wrapper; what it wraps comes next
            continue
        parent, _, leaf = wrapped_name.replace(".base_layer", "").rpartition(".")
        names = [".".join(filter(None, (parent, part))) for part in packed.get(leaf, [leaf])]
        weights = [expected[f"{n}.weight"] for n in names if f"{n}.weight" in expected]
        if len(weights) < len(names):
            continue
        wanted, got = _products(module, weights), _output(module, weights)
        if not wanted or got is None:
            continue
        num_compared += len(weights)
        for part, answer, possible in zip(
            names, torch.split(got, [len(each[0]) for each in wanted]), wanted, strict=True
        ):
            if not any(_near(answer, product, tolerance) for product in possible):
                differing.add(f"{part}.weight")
    return [name for name in expected if name in differing], num_compared


def _near(answer: Tensor, product: Tensor, tolerance: float) -> bool:
    spread = product.abs().max().clamp_min(1e-6)
    return bool((answer - product).abs().max() <= tolerance * spread)


def _width(module: Any) -> int | None:
    """Return a layer's number of inputs; None if it has no such attribute."""
    for name in ("input_size_per_partition", "input_size", "embedding_dim"):
        found = getattr(module, name, None)
        if isinstance(found, int):
            return found
    return None


def _products(module: Any, weights: Sequence[Tensor]) -> list[list[Tensor]]:
    """Return the possible outputs for each weight; nothing if a weight does not fit the layer.

    Some architectures store weights transposed; a square one may be either way round.
    """
    if weights[0].ndim == 1:
        return [[weight.float()] for weight in weights]
    width = _width(module)
    if width is None or any(weight.ndim != 2 for weight in weights):
        return []
    probe, found = _probe(width), []
    for weight in weights:
        oriented = [w.float() for w in (weight, weight.T) if w.shape[1] == width]
        found.append([w @ probe for w in oriented])
    return found if all(found) else []


def _probe(width: int) -> Tensor:
    """Return the probe, (D,) float32 of +-1, the same for a width on every machine."""
    generator = torch.Generator().manual_seed(zlib.crc32(str(width).encode()))
    return torch.randint(0, 2, (width,), generator=generator).float() * 2 - 1


@torch.no_grad()
def _output(module: Any, weights: Sequence[Tensor]) -> Tensor | None:
    """Return a layer's output for the probe, or its weight if that is a vector; None: unknown."""
    own = getattr(module, "weight", None)
    if weights[0].ndim == 1:
        return own.detach().float().cpu() if own is not None and own.ndim == 1 else None
    method, width = getattr(module, "quant_method", None), _width(module)
    if method is None or width is None:
        return None
    rows = sum(weight.numel() // width for weight in weights)
    # A layer with `cpu_linear` computes with a packed copy and ignores its weight.
    if own is not None and own.ndim == 2 and not hasattr(module, "cpu_linear"):
        fits = own.shape[0] >= rows and own.shape[1] == width
        return own.detach()[:rows].float().cpu() @ _probe(width) if fits else None
    device = next((p.device for p in module.parameters() if p.device.type != "meta"), "cpu")
    probe = _probe(width)[None].to(device, getattr(module, "params_dtype", weights[0].dtype))
    answer: Tensor = method.apply(module, probe, bias=None)[0, :rows]
    return answer.float().cpu()
