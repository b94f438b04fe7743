"""The worker extension with which a vLLM server takes a trainer's weights.

`--worker-extension-cls` names it. Its methods are called on every worker over HTTP
(`/collective_rpc`), so all arguments and results are text.
"""

import json
from pathlib import Path
from typing import Any

import torch

from fastalign.rollouts.engines.broadcast import join_group, receive
from fastalign.rollouts.engines.weights import accepted_by, differing_tensors, read_tensors


class WorkerExtension:
    """Mixin of vLLM's worker, which has `reload_weights`, `get_model` and `model_config`."""

    _fastalign_version = ""
    _group: Any = None
    _device: Any = None

    def fastalign_state(self) -> str:
        """Return as JSON: `version`, the name of the last sync, and the model's `config`."""
        worker: Any = self
        config = worker.model_config.hf_config.to_dict()
        return json.dumps({"version": self._fastalign_version, "config": config}, default=str)

    def fastalign_load(self, folder: str, version: str) -> str:
        """Take over the tensors in a folder; after an error the weights have no version."""
        worker: Any = self
        self._fastalign_version = ""
        self._forget_adapters()
        worker.reload_weights(
            weights_iterator=accepted_by(worker.get_model(), read_tensors(Path(folder)))
        )
        self._fastalign_version = version
        return version

    def _forget_adapters(self) -> None:
        """Remove the adapters that an earlier run left, and the weights in their slots.

        A CPU engine adds the last slot's product to tokens without an adapter while it decodes.
        """
        worker: Any = self
        if not worker.lora_config:
            return
        for number in worker.list_loras():
            worker.remove_lora(number)
        manager = worker.model_runner.lora_manager._adapter_manager
        for module in manager.modules.values():
            for slot in range(manager.lora_slots):
                module.reset_lora(slot)

    def fastalign_workers(self) -> str:
        """Return as JSON the `number` of workers and the type of their `device`."""
        worker: Any = self
        number = worker.parallel_config.world_size
        return json.dumps({"number": number, "device": worker.device.type})

    def fastalign_join(
        self, host: str, port: str, size: str, device_type: str, seconds: str
    ) -> str:
        """Join the trainer's group."""
        worker: Any = self
        self._device = worker.device if device_type == "cuda" else torch.device("cpu")
        rank = 1 + worker.rank
        self._group = join_group(host, int(port), rank, int(size), self._device, float(seconds))
        return str(rank)

    def fastalign_receive(self, description: str, version: str) -> str:
        """Take over the tensors that the trainer sends to its group."""
        worker: Any = self
        self._fastalign_version = ""
        tensors = receive(self._group, description, self._device)
        self._forget_adapters()
        worker.reload_weights(weights_iterator=accepted_by(worker.get_model(), tensors))
        self._fastalign_version = version
        return version

    def fastalign_adapted(self, version: str) -> str:
        """Record the version of an adapter that the server was given."""
        self._fastalign_version = version
        return version

    def fastalign_differing(self, folder: str, tolerance: str) -> str:
        """Return as JSON what `differing_tensors` finds for the tensors in a folder."""
        worker: Any = self
        found = differing_tensors(
            worker.get_model(), read_tensors(Path(folder)), tolerance=float(tolerance)
        )
        return json.dumps(found)
