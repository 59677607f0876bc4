"""A model with its adapter, as one flat vector over the adapter's layout."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn

from ..kernels.lowrank import orthonormalize
from ..protocols.errors import ModelError
from ..protocols.layout import AdapterLayout, Flat, Role, TensorSpec
from .prefix import PREFIX, PrefixStates
from .tasks import Batch, CausalLanguageModel, Examples, Indices, Task


@dataclass
class AdaptedModel:
    """A peft model, its task, and its adapter as one flat vector.

    `parameters` maps the layout's names (peft's own, as saved) to the model's parameters, in the layout's order.
    """

    model: PeftModel
    task: Task
    layout: AdapterLayout
    parameters: dict[str, nn.Parameter]
    parameter_names: dict[str, str]
    prefix: PrefixStates = field(default_factory=PrefixStates)

    @property
    def device(self) -> torch.device:
        return next(iter(self.parameters.values())).device

    def read(self) -> Flat:
        """The adapter in the model, fp32, (layout.size,)."""
        return self.layout.join({n: p.detach().float().cpu().numpy() for n, p in self.parameters.items()})

    @torch.no_grad()
    def write(self, flat: Flat) -> None:
        """Put an adapter (fp32, (layout.size,)) into the model."""
        for name, values in self.layout.split(flat).items():
            self.parameters[name].copy_(torch.from_numpy(values))

    def prepare(self, examples: Examples, indices: Indices) -> None:
        """Run the frozen prefix for all of these examples at once: cheaper than batch by batch."""
        self.prefix.fill(self.model, self.task, examples, indices)

    def batch(self, examples: Examples, members: Sequence[Indices]) -> Batch:
        """`members[m]` are the indices of member m's examples; the batch is on the model's device."""
        self.prepare(examples, np.concatenate(members))
        batch = self.task.collate(examples, members)
        rows, length = (max(size) for size in zip(*batch.shapes, strict=True))
        inputs = {key: value.to(self.device) for key, value in batch.inputs.items()}
        states = self.prefix.gather(examples, members, (rows, length))
        if states is not None:
            inputs[PREFIX] = states
        return Batch(inputs, batch.labels.to(self.device), batch.shapes)

    def config(self) -> dict[str, Any]:
        """What peft writes to adapter_config.json; of a bottleneck, what `load_adapted_folder` reads."""
        config = self.model.peft_config[self.model.active_adapter].to_dict()
        plain = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
        if plain["modules_to_save"]:
            # peft adds the names that a task's heads may have each time that it loads a folder
            plain["modules_to_save"] = sorted(set(plain["modules_to_save"]))
        return {**plain, "inference_mode": True}

    def base_digest(self) -> str:
        """SHA-256 over names and values of the frozen parameters, whatever is adapted and however a head was drawn."""
        digest = sha256()
        own = {id(parameter) for parameter in self.parameters.values()}
        frozen = {
            f"base_model.model.{name.replace('.base_layer.', '.')}": parameter
            for name, parameter in self.model.get_base_model().named_parameters()
            if id(parameter) not in own
            and ".original_module." not in name  # peft keeps a copy of each trained head
            and ".ranknum." not in name  # AdaLoRA's own
        }
        for name, parameter in sorted(frozen.items()):
            digest.update(f"{name}{tuple(parameter.shape)}{parameter.dtype}".encode())
            digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy())
        return digest.hexdigest()


def adapt(model: PeftModel, task: Task) -> AdaptedModel:
    """Somebody's own peft model as an AdaptedModel: its trainable parameters are what is federated."""
    parameters, names, tensors = {}, {}, []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            saved = _saved_name(name, model.active_adapter)
            parameters[saved], names[saved] = parameter, name
            tensors.append(TensorSpec(saved, tuple(parameter.shape), _role(model, name)))
    if not tensors:
        raise ModelError("the model has no trainable parameter: wrap it with peft.get_peft_model first")
    layout = AdapterLayout(tensors)
    model.eval()
    if model.active_peft_config.is_prompt_learning and isinstance(task, CausalLanguageModel):
        model.register_forward_hook(_without_prompt, with_kwargs=True)
    order = [t.name for t in layout.tensors]
    return AdaptedModel(model, task, layout, {n: parameters[n] for n in order}, {n: names[n] for n in order})


def _saved_name(name: str, adapter: str) -> str:
    """What `peft` calls a parameter in a saved adapter: without the adapter's own name, and two by names of their own."""
    if name == f"prompt_encoder.{adapter}.embedding.weight":
        return "prompt_embeddings"
    saved = name.replace(f".modules_to_save.{adapter}.", ".") + "."
    saved = saved.replace(f".{adapter}.", ".").removesuffix(".")
    return saved.removesuffix(".weight") if ".lora_magnitude_vector." in saved else saved


def _role(model: PeftModel, name: str) -> Role:
    """`A` or `B` for the factors of plain LoRA alone, because only there `B·A` is what is added to the weight.

    DoRA rescales the sum, AdaLoRA puts a diagonal between the two, and VeRA trains no factor.
    """
    module, lora, factor = name.partition(".lora_")
    parameter = model.get_parameter(name)
    if not lora or factor[:2] not in ("A.", "B.") or not name.endswith(".weight") or parameter.dim() != 2:
        return "other"
    layer = model.get_submodule(module)
    if not isinstance(layer, LoraLayer) or layer.lora_variant:
        return "other"
    return "A" if factor[0] == "A" else "B"


def _without_prompt(model: nn.Module, args: tuple[Any, ...], inputs: Mapping[str, Any], output: Any) -> Any:
    """The logits of the text alone: a language model gives some for its virtual tokens too."""
    output.logits = output.logits[:, -inputs["input_ids"].shape[1] :]
    return output


def orthonormalize_factors(adapted: AdaptedModel) -> None:
    """The same adapter with orthonormal rows in every A."""
    flat = adapted.read()
    tensors = adapted.layout.split(flat)
    for pair in adapted.layout.pairs:
        if pair.rank > pair.a.shape[1]:
            raise ModelError(f"adapter.rank = {pair.rank}: {pair.module} has only {pair.a.shape[1]} inputs.")
        b, a = orthonormalize(tensors[pair.b.name], tensors[pair.a.name])
        tensors[pair.b.name][...], tensors[pair.a.name][...] = b.astype(np.float32), a.astype(np.float32)
    adapted.write(flat)
