"""Loading the frozen base and putting an adapter on it.

The base is a Hugging Face id, a local folder, or `builtin:byte-llama` (in this package). Code from a model's folder
is never run. Whatever the checkpoint does not hold (a new classifier) is drawn from the run's seed, trained and sent
like the factors; so all nodes start alike.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from ..kernels.lowrank import orthonormalize
from ..protocols.errors import ModelError
from ..protocols.keys import derive, generator
from ..protocols.layout import AdapterLayout, Flat, Role, TensorSpec
from ..protocols.recipes import initial_a
from ..protocols.spec import RunSpec
from .tasks import CausalLanguageModel, ImageClassification, SequenceClassification, Task

CLASSES = {
    "sequence-classification": (AutoModelForSequenceClassification, "SEQ_CLS"),
    "causal-lm": (AutoModelForCausalLM, "CAUSAL_LM"),
    "image-classification": (AutoModelForImageClassification, None),
}
HEADS = {"sequence-classification": ("classifier", "score"), "image-classification": ("classifier",), "causal-lm": ()}


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

    @property
    def device(self) -> torch.device:
        device: torch.device = next(self.model.parameters()).device
        return device

    def read(self) -> Flat:
        """The adapter in the model, fp32, (layout.size,)."""
        return self.layout.join({n: p.detach().float().cpu().numpy() for n, p in self.parameters.items()})

    @torch.no_grad()
    def write(self, flat: Flat) -> None:
        """Put an adapter (fp32, (layout.size,)) into the model."""
        for name, values in self.layout.split(flat).items():
            self.parameters[name].copy_(torch.from_numpy(values))

    def config(self) -> dict[str, Any]:
        """What peft writes to adapter_config.json."""
        config = self.model.peft_config[self.model.active_adapter].to_dict()
        plain = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
        return {**plain, "inference_mode": True}

    def base_digest(self) -> str:
        """SHA-256 over names and values of the frozen parameters, whatever is adapted and however a head was drawn."""
        digest = sha256()
        own = set(self.parameter_names.values())
        frozen = {
            name.replace(".base_layer.", "."): parameter
            for name, parameter in self.model.named_parameters()
            if name not in own and ".original_module." not in name  # peft keeps a copy of each trained head
        }
        for name, parameter in sorted(frozen.items()):
            digest.update(f"{name}{tuple(parameter.shape)}{parameter.dtype}".encode())
            digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy())
        return digest.hexdigest()


def load_model(spec: RunSpec) -> AdaptedModel:
    """The spec's base with the adapter of round 0. Raises ModelError where the base or the adapter cannot be had."""
    folder = base_folder(spec.model.base)
    base, missing = _load_base(spec, folder)
    _draw_missing(base, missing, spec.run.seed)
    model = _load_start(spec, base) if spec.adapter.start else _new_adapter(spec, base, missing)
    _fp32_heads(model)
    task = _load_task(spec, folder)
    if isinstance(task, SequenceClassification):
        # A decoder finds the last token of a text by it: what is padded with has to be what it takes for padding.
        model.config.get_text_config().pad_token_id = task.pad
    adapted = adapt(model, task)
    if not spec.adapter.start:
        _draw_factors(adapted, spec.run.seed)
    if initial_a(spec) == "orthonormal":
        orthonormalize_factors(adapted)
    return adapted


def adapt(model: PeftModel, task: Task) -> AdaptedModel:
    """Somebody's own peft model as an AdaptedModel: its trainable parameters are what is federated."""
    adapter = model.active_adapter
    parameters, names, tensors = {}, {}, []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        saved = name.replace(f".modules_to_save.{adapter}.", ".").replace(f".{adapter}.", ".")
        role: Role = "A" if ".lora_A." in saved else "B" if ".lora_B." in saved else "other"
        parameters[saved], names[saved] = parameter, name
        tensors.append(TensorSpec(saved, tuple(parameter.shape), role if parameter.dim() == 2 else "other"))
    if not tensors:
        raise ModelError("the model has no trainable parameter: wrap it with peft.get_peft_model first")
    layout = AdapterLayout(tensors)
    model.eval()
    order = [t.name for t in layout.tensors]
    return AdaptedModel(model, task, layout, {n: parameters[n] for n in order}, {n: names[n] for n in order})


def base_folder(base: str) -> str:
    """The folder of a builtin base; any other name as it is."""
    if not base.startswith("builtin:"):
        return base
    name = base.removeprefix("builtin:")
    folder = files("fedapt.client") / "builtin" / name
    if not folder.is_dir():
        raise ModelError(f'model.base = "{base}": there is no such builtin model; there is builtin:byte-llama.')
    return str(folder)


def _load_base(spec: RunSpec, folder: str) -> tuple[nn.Module, list[str]]:
    """The base in its precision, and the names of the parameters that its checkpoint lacks."""
    auto, _ = CLASSES[spec.model.task]
    extra: dict[str, Any] = {} if spec.model.labels is None else {"num_labels": spec.model.labels}
    if spec.model.precision == "bf16" and not torch.cuda.is_available():
        extra["attn_implementation"] = "eager"  # SDPA's bf16 backward on a CPU takes most of the step
    dtype = torch.bfloat16 if spec.model.precision == "bf16" else torch.float32
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        changes_head = spec.model.labels is not None and config.num_labels != spec.model.labels
        base, info = auto.from_pretrained(
            folder,
            trust_remote_code=False,
            use_safetensors=True,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=changes_head,
            **extra,
        )
    except (
        Exception
    ) as error:  # transformers raises OSError, ValueError, KeyError and its own for one cause: not loadable
        raise ModelError(_explain(spec.model.base, error)) from error
    mismatched = [key if isinstance(key, str) else key[0] for key in info.get("mismatched_keys", ())]
    return base, sorted({*info["missing_keys"], *mismatched})


def _explain(base: str, error: Exception) -> str:
    if Path(base).is_dir():
        missing = " It has no config.json." if not (Path(base) / "config.json").is_file() else ""
        return (
            f'model.base = "{base}": this folder is no Hugging Face model of the task.{missing} ({_first_line(error)})'
        )
    if base.startswith((".", "/", "~")):
        return f'model.base = "{base}": no such folder.'
    return (
        f'model.base = "{base}": not a local folder, and it cannot be had from the hub (no network, or no such id). '
        f"Download it once where there is a network and name its folder here. ({_first_line(error)})"
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__


def _new_adapter(spec: RunSpec, base: nn.Module, missing: Iterable[str]) -> PeftModel:
    kept = {name for name in HEADS[spec.model.task] if name in dict(base.named_modules())}
    modules = {name.rpartition(".")[0] for name in missing}
    drawn = {module for module in modules if module.split(".")[0] not in kept}
    targets = spec.adapter.targets
    config = LoraConfig(
        task_type=CLASSES[spec.model.task][1],
        r=spec.adapter.rank,
        lora_alpha=spec.adapter.alpha,
        lora_dropout=spec.adapter.dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        modules_to_save=sorted(kept | drawn) or None,
    )
    try:
        return get_peft_model(base, config)
    except ValueError as error:
        raise ModelError(f"adapter.targets = {spec.adapter.targets!r}: {_first_line(error)}") from error


def _load_start(spec: RunSpec, base: nn.Module) -> PeftModel:
    start = str(spec.adapter.start)
    if not (Path(start) / "adapter_config.json").is_file():
        raise ModelError(f'adapter.start = "{start}": no adapter folder (it has no adapter_config.json).')
    try:
        return PeftModel.from_pretrained(base, start, is_trainable=True)
    except Exception as error:
        raise ModelError(f'adapter.start = "{start}": does not fit this base ({_first_line(error)})') from error


def _load_task(spec: RunSpec, folder: str) -> Task:
    try:
        if spec.model.task == "image-classification":
            return ImageClassification(AutoImageProcessor.from_pretrained(folder, trust_remote_code=False))
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        raise ModelError(
            f'model.base = "{spec.model.base}": no tokenizer or processor ({_first_line(error)})'
        ) from error
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        # transformers makes an empty tokenizer of a folder that holds none
        raise ModelError(f'model.base = "{spec.model.base}": no tokenizer (it knows no word; add tokenizer.json).')
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    kind = SequenceClassification if spec.model.task == "sequence-classification" else CausalLanguageModel
    return kind(tokenizer, spec.model.max_length, tokenizer.pad_token_id or 0)


@torch.no_grad()
def _draw_missing(base: nn.Module, missing: Iterable[str], seed: int) -> None:
    """Parameters that the checkpoint lacks: N(0, 0.02²) for matrices, 1 for norm weights, 0 for biases, keyed by name."""
    for name in missing:
        parameter = base.get_parameter(name)
        if parameter.dim() > 1:
            values = 0.02 * generator(derive(seed, "head", name)).standard_normal(parameter.shape)
            parameter.copy_(torch.from_numpy(values))
        else:
            parameter.fill_(1.0 if name.endswith("weight") else 0.0)


def _fp32_heads(model: PeftModel) -> None:
    """What is trained is fp32 always; over a bf16 base a trained head takes its input in fp32."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            parameter.data = parameter.data.float()
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        if own and all(p.requires_grad and p.dtype == torch.float32 for p in own):
            module.register_forward_pre_hook(_to_fp32)


def _to_fp32(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(x.float() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in inputs)


def _draw_factors(adapted: AdaptedModel, seed: int) -> None:
    """peft's own initial values, keyed: A uniform in ±1/√in (Kaiming with a = √5), B zero."""
    flat = adapted.read()
    tensors = adapted.layout.split(flat)
    for pair in adapted.layout.pairs:
        bound = pair.a.shape[1] ** -0.5
        tensors[pair.a.name][...] = generator(derive(seed, "A", pair.module)).uniform(-bound, bound, pair.a.shape)
        tensors[pair.b.name][...] = 0.0
    adapted.write(flat)


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


def load_adapted_folder(
    folder: Path, base: str, config: Mapping[str, Any], labels: int | None
) -> tuple[PeftModel, Any]:
    """An adapter folder on its base, and the base's tokenizer or processor (None if it has none).

    `config` is the adapter's own; `labels` the classes of its head. Raises ModelError.
    """
    kinds = {kind: auto for auto, kind in CLASSES.values() if kind}
    auto = kinds.get(str(config.get("task_type")), AutoModelForImageClassification)
    sizes: dict[str, Any] = {} if labels is None else {"num_labels": labels, "ignore_mismatched_sizes": True}
    try:
        model = auto.from_pretrained(base, trust_remote_code=False, use_safetensors=True, **sizes)
        adapted = PeftModel.from_pretrained(model, folder)
    except Exception as error:
        raise ModelError(
            f'{folder}: its base "{base}" cannot take it ({_first_line(error)}); name it with --base'
        ) from error
    for loader in (AutoTokenizer, AutoImageProcessor):
        try:
            return adapted, loader.from_pretrained(base, trust_remote_code=False)
        except (OSError, ValueError, KeyError):  # a base without one of the two is ordinary
            pass
    return adapted, None
