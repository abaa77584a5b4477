"""What training takes besides the optimizer: weights, gradients, and activations by a forward pass of shapes.

The forward pass runs on torch's fake tensors, which have shapes and no memory.  What autograd keeps of it is counted:
an estimate, as another attention kernel keeps other things, and a compiler less.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..exceptions import OptionError
from ..utils.extras import named

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from .shardings import Sharding


@dataclass(frozen=True)
class Batch:
    """What a rank computes at a time."""

    sequences: int
    tokens: int
    """Of a sequence."""
    checkpointing: bool = False
    """Gradient checkpointing: layers are computed again in backward."""

    def __post_init__(self) -> None:
        if self.sequences < 1 or self.tokens < 1:
            raise OptionError(f"batch={self.sequences}, seq_len={self.tokens} are not allowed: they must be >= 1")


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes on the fullest rank."""

    dtype: str
    weights: int
    gradients: int
    batch: Batch | None
    activations: int
    """An estimate; 0 without a batch."""

    def peak(self, state: int, step: int) -> int:
        """With an optimizer's state, at the worse of two moments: the end of forward, and the optimizer's step."""
        return self.weights + self.gradients + state + max(self.activations, step)


def weights_and_gradients(parameters: Iterable[nn.Parameter], layout: Sharding) -> tuple[int, int]:
    """Bytes of a rank.

    DeepSpeed keeps 16-bit weights whole (stage 3: in parts) and float32 copies of what is trained in parts.
    """
    frozen = trained = masters = 0
    for p in parameters:
        if p.requires_grad:
            trained += p.numel() * p.element_size()
            masters += 4 * p.numel() if layout.in_deepspeed and p.element_size() < 4 else 0
        else:
            frozen += p.numel() * p.element_size()
    parts = {"ddp": 1, "zero1": 1, "zero2": 1}.get(layout.name, layout.shards)
    gradient_parts = layout.shards if layout.name in ("zero2", "zero3", "fsdp2", "hsdp") else 1
    weights = math.ceil((frozen + trained) / parts) + math.ceil(masters / layout.shards)
    return weights, math.ceil(trained / gradient_parts)


def activations(model: Any, batch: Batch) -> int:
    """Bytes that autograd keeps of a forward pass with its loss.

    Args:
        model: a causal language model of transformers on the meta device.
        batch: what is computed.

    Raises:
        OptionError: the model's forward pass cannot be followed by shapes alone.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    model = copy.deepcopy(model)  # its parameters are exchanged for fake ones
    try:
        with FakeTensorMode():
            _exchange(model)
            model.train()
            kept = _kept(model, batch)
            if not batch.checkpointing:
                return kept
            model.gradient_checkpointing_enable()
            inputs = _kept(model, batch)
    except Exception as error:  # whatever a model's code does with values that are not there
        raise OptionError(f"the activations of {type(model).__name__} cannot be estimated: {error}") from error
    layers = getattr(model.config, "num_hidden_layers", 1)
    return inputs + (kept - inputs) // layers  # the inputs of all layers, and the layer that is computed again


def _exchange(model: nn.Module) -> None:
    """Fake tensors on the CPU in the place of those on the meta device, on which a value may not even be asked for."""
    made: dict[int, Any] = {}
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                fake = made.setdefault(id(p), nn.Parameter(torch.empty(p.shape, dtype=p.dtype), p.requires_grad))
                module._parameters[name] = fake
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def build(config: PreTrainedConfig, dtype: torch.dtype, lora: int) -> Any:
    """The model of a configuration, on torch's current device, with adapters of rank `lora` unless it is 0.

    Raises:
        OptionError: a configuration that names no architecture, and is none of a causal language model.
    """
    with named():
        import transformers

    architecture = getattr(transformers, (config.architectures or [""])[0], None)
    if architecture is not None:
        model = architecture._from_config(config, dtype=dtype)
    elif type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    else:
        raise OptionError(f"a configuration of type {config.model_type} without architectures is of no causal language "
                          'model: name the class in its config.json ("architectures": ["..."], as a model\'s '
                          "save_pretrained does), or give hf_shampoo4.plan the module")  # fmt: skip
    if not lora:
        return model
    with named():
        from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=lora, target_modules="all-linear", task_type="CAUSAL_LM"))


def _kept(model: Any, batch: Batch) -> int:
    """Bytes of the storages that autograd keeps, without those of the parameters."""
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        kept.setdefault(t.untyped_storage()._cdata, t)
        return t

    ids = torch.zeros((batch.sequences, batch.tokens), dtype=torch.long)
    cache = {"use_cache": False} if hasattr(model.config, "use_cache") else {}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(input_ids=ids, labels=ids, **cache)
    return sum(t.untyped_storage().nbytes() for key, t in kept.items() if key not in own)
