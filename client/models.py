"""Loading the frozen base and putting an adapter on it.

The base is a Hugging Face id, a local folder, or `builtin:byte-llama` (in this package). Code from a model's folder
is never run. Whatever the checkpoint does not hold (a new classifier) is drawn from the run's seed, trained and sent
like the factors; so all nodes start alike.
"""

import json
from collections.abc import Iterable, Mapping
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model, load_peft_weights, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
)

from ..protocols.errors import ModelError
from ..protocols.keys import derive, generator
from ..protocols.legality import initial_a, recipe_of
from ..protocols.spec import RunSpec
from . import bottleneck, nola
from .adapted import AdaptedModel, adapt, orthonormalize_factors
from .adapters import (
    TASK_TYPES,
    draw_start,
    first_line,
    keep_biases,
    methods_of,
    new_adapter,
    quiet_projections,
    refuse_untrainable,
    train_own,
)
from .bottleneck import BottleneckConfig
from .eva import start_from_public
from .first_token import read_first_token
from .frozen import add_frozen
from .nola import NolaConfig
from .tasks import CausalLanguageModel, ImageClassification, SequenceClassification, Task, prompted

CLASSES = {
    "sequence-classification": AutoModelForSequenceClassification,
    "causal-lm": AutoModelForCausalLM,
    "prompted-classification": AutoModelForCausalLM,
    "image-classification": AutoModelForImageClassification,
}


Quantize = Literal["none", "nf4", "int8"]


def load_model(spec: RunSpec, quantize: Quantize = "none") -> AdaptedModel:
    """The spec's base with the adapter of round 0. A base that is quantized is on the GPU, any other in main memory.

    Raises ModelError where the base or the adapter cannot be had, DataError where A starts from public data that cannot.
    """
    folder = base_folder(spec.model.base)
    base, missing = _load_base(spec, folder, quantize)
    _draw_missing(base, missing, spec.run.seed)
    model = _load_start(spec, base) if spec.adapter.start else new_adapter(spec, base, missing)
    refuse_untrainable(spec, model)
    _fp32_heads(model)
    task = _load_task(spec, folder)
    if isinstance(task, SequenceClassification):
        # A decoder finds the last token of a text by it: what is padded with has to be what it takes for padding.
        model.config.get_text_config().pad_token_id = task.pad
    adapted = adapt(model, task)
    if not spec.adapter.start:
        draw_start(spec, model, adapted.parameters)
    if initial_a(spec) == "orthonormal":
        orthonormalize_factors(adapted)
    elif initial_a(spec) == "eva":
        start_from_public(adapted, spec)
    adapted = add_frozen(adapted, recipe_of(spec), spec)
    if isinstance(task, SequenceClassification):
        read_first_token(model)
    return adapted


def base_folder(base: str) -> str:
    """The folder of a builtin base; any other name as it is."""
    if not base.startswith("builtin:"):
        return base
    name = base.removeprefix("builtin:")
    folder = files("fedapt.client") / "builtin" / name
    if not folder.is_dir():
        raise ModelError(f'model.base = "{base}": there is no such builtin model; there is builtin:byte-llama.')
    return str(folder)


def _load_base(spec: RunSpec, folder: str, quantize: Quantize) -> tuple[nn.Module, list[str]]:
    """The base in its precision, and the names of the parameters that its checkpoint lacks."""
    auto = CLASSES[spec.model.task]
    labels = None if auto is AutoModelForCausalLM else spec.model.labels
    extra: dict[str, Any] = {} if labels is None else {"num_labels": labels}
    if quantize != "none":
        extra |= {"quantization_config": _quantization(quantize), "device_map": {"": 0}}
    if spec.model.precision == "bf16" and not torch.cuda.is_available():
        extra["attn_implementation"] = "eager"  # SDPA's bf16 backward on a CPU takes most of the step
    dtype = torch.bfloat16 if spec.model.precision == "bf16" else torch.float32
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        changes_head = labels is not None and config.num_labels != labels
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


HEADS = ["classifier", "score", "pooler", "lm_head"]
"""Modules that are never quantized: a head is trained, or decides about every answer."""


def _quantization(quantize: Quantize) -> Any:
    """What makes transformers quantize a base. Raises ModelError where this machine cannot."""
    if not torch.cuda.is_available() or find_spec("bitsandbytes") is None:
        lacking = "bitsandbytes (pip install fedapt[gpu])" if torch.cuda.is_available() else "a CUDA GPU"
        raise ModelError(f'quantize = "{quantize}" needs {lacking}, which is not here. Way out: quantize = "none"')
    if quantize == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=HEADS)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=HEADS,
    )


def _explain(base: str, error: Exception) -> str:
    if Path(base).is_dir():
        missing = " It has no config.json." if not (Path(base) / "config.json").is_file() else ""
        return (
            f'model.base = "{base}": this folder is no Hugging Face model of the task.{missing} ({first_line(error)})'
        )
    if base.startswith((".", "/", "~")):
        return f'model.base = "{base}": no such folder.'
    return (
        f'model.base = "{base}": not a local folder, and it cannot be had from the hub (no network, or no such id). '
        f"Download it once where there is a network and name its folder here. ({first_line(error)})"
    )


def _load_start(spec: RunSpec, base: nn.Module) -> PeftModel:
    """The adapter in `adapter.start` on the base; it, and not the spec, says what rank it has and what it targets."""
    start = str(spec.adapter.start)
    try:
        config = json.loads(Path(start, "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise ModelError(f'adapter.start = "{start}": no adapter folder (it has no adapter_config.json).') from None
    methods = methods_of(config)
    if methods and spec.adapter.method not in methods:
        raise ModelError(
            f'adapter.start = "{start}": its kind is not "{spec.adapter.method}". Set adapter.method = "{methods[0]}".'
        )
    try:
        model = _on_base(base, Path(start), config, trainable=True)
    except Exception as error:
        raise ModelError(f'adapter.start = "{start}": does not fit this base ({first_line(error)})') from error
    train_own(model, spec.adapter.method)
    if spec.adapter.method == "bias":
        keep_biases(model, load_peft_weights(start, device="cpu"))
    return model


def _on_base(base: nn.Module, folder: Path, config: Mapping[str, Any], trainable: bool = False) -> PeftModel:
    """The adapter of a folder on its base. Raises what `peft` and torch raise where they do not fit.

    NOLA that is not to be trained becomes plain LoRA, which can be merged and saved like any other.
    """
    kind = config.get("peft_type")
    if kind not in ("BOTTLENECK", "NOLA"):
        trainable = trainable and kind not in ("PROMPT_TUNING", "PREFIX_TUNING")  # peft refuses it
        with quiet_projections():
            return PeftModel.from_pretrained(base, folder, is_trainable=trainable)
    tensors = load_file(folder / "adapter_model.safetensors")
    own: LoraConfig
    if kind == "BOTTLENECK":
        own = BottleneckConfig(**{key: config[key] for key in ("task_type", "modules_to_save", "width", "after")})
        bottleneck.insert(base, own.after, own.width)
    elif trainable:
        own = NolaConfig.of(config)
        nola.insert(base, own)
    else:
        own, tensors = nola.as_lora(base, NolaConfig.of(config), tensors)
    model = get_peft_model(base, own)
    result = set_peft_model_state_dict(model, tensors)
    if result.unexpected_keys:
        raise ValueError(f"the base has no {result.unexpected_keys[0]}")
    lost = [name for name in result.missing_keys if bottleneck.PREFIX in name or nola.PREFIX in name]
    if lost:
        raise ValueError(f"the folder has no {lost[0]}")
    return model.eval()


def _load_task(spec: RunSpec, folder: str) -> Task:
    try:
        if spec.model.task == "image-classification":
            return ImageClassification(AutoImageProcessor.from_pretrained(folder, trust_remote_code=False))
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        raise ModelError(
            f'model.base = "{spec.model.base}": no tokenizer or processor ({first_line(error)})'
        ) from error
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        # transformers makes an empty tokenizer of a folder that holds none
        raise ModelError(f'model.base = "{spec.model.base}": no tokenizer (it knows no word; add tokenizer.json).')
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    if spec.model.task == "prompted-classification":
        return prompted(tokenizer, spec.model)
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


def load_adapted_folder(
    folder: Path, base: str, config: Mapping[str, Any], labels: int | None
) -> tuple[PeftModel, Any]:
    """An adapter folder on its base, and the base's tokenizer or processor (None if it has none).

    `config` is the adapter's own; `labels` the classes of its head. Raises ModelError.
    """
    tasks = {kind: task for task, kind in TASK_TYPES.items()}
    auto = CLASSES[tasks.get(config.get("task_type"), "image-classification")]
    sizes: dict[str, Any] = {} if labels is None else {"num_labels": labels, "ignore_mismatched_sizes": True}
    try:
        model = auto.from_pretrained(base, trust_remote_code=False, use_safetensors=True, **sizes)
        adapted = _on_base(model, folder, config)
    except Exception as error:
        raise ModelError(
            f'{folder}: its base "{base}" cannot take it ({first_line(error)}); name it with --base'
        ) from error
    for loader in (AutoTokenizer, AutoImageProcessor):
        try:
            return adapted, loader.from_pretrained(base, trust_remote_code=False)
        except (OSError, ValueError, KeyError):  # a base without one of the two is ordinary
            pass
    return adapted, None
