"""What a run computes on, for whoever reads its speed later: `machine.json` in its folder."""

import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from fastalign.models import find_device
from fastalign.trainers.checkpoint_files import write_text_atomically
from fastalign.world import world_of_environment

MACHINE_FILE = "machine.json"


def write_machine(folder: Path, train: dict[str, Any]) -> None:
    """Writes device, number of processes, dtype of the products, and versions.

    Args:
        folder: of the run.
        train: the run's settings of that name.

    Raises:
        ValueError: a device that is not there.
    """
    device = find_device(train["device"], "train.device")
    on_gpu = device.type == "cuda"
    bf16 = train["precision"] == "bf16" or (train["precision"] == "auto" and on_gpu)
    found = {
        "device": torch.cuda.get_device_name(device) if on_gpu else f"cpu {platform.machine()}",
        "num_processes": world_of_environment().size,
        "products": "bfloat16" if bf16 else "float32",
        "torch": torch.__version__,
        "fastalign": version("fastalign"),
    }
    write_text_atomically(folder / MACHINE_FILE, json.dumps(found, indent=1) + "\n")
