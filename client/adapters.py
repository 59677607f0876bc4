"""Making the adapter of each kind that `[adapter] method` names, and its values at the start of a run.

Every kind is a PeftModel, and each saves in a form that `peft` loads, but for the two that `peft` does not have:
bottleneck and NOLA, each in a file of its own.
`bias`, `head` and `full` train parameters that the base has already: a LoRA config without a target, whose folder
holds those parameters under the base's own names. All values at the start are drawn by key: nodes that share a base
and a seed start alike.
"""

import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..protocols.errors import ModelError
from ..protocols.keys import derive, generator
from ..protocols.spec import RunSpec
from . import bottleneck, nola
from .blocks import block_of, linear_within, modules_of, refuse_beyond

TASK_TYPES = {
    "sequence-classification": "SEQ_CLS",
    "prompted-classification": "CAUSAL_LM",
    "causal-lm": "CAUSAL_LM",
    "image-classification": None,
}
HEADS = {
    "sequence-classification": ("classifier", "score"),
    "prompted-classification": (),
    "causal-lm": (),
    "image-classification": ("classifier",),
}
PROMPT = "prompt_embeddings"
"""What `peft` calls the one tensor of a prompt or a prefix where it is saved."""


def new_adapter(spec: RunSpec, base: nn.Module, missing: Iterable[str]) -> PeftModel:
    """The base with a new adapter. Raises ModelError where this base cannot carry the kind, naming one that it can."""
    _refuse_unfit(spec, base)
    heads = _heads(spec, base, missing)
    if spec.adapter.method == "head" and not heads:
        raise ModelError('adapter.method = "head" is illegal here: there is no classifier. Nearest legal: "lora".')
    shared = {"task_type": TASK_TYPES[spec.model.task], "modules_to_save": heads or None}
    config: PeftConfig
    if spec.adapter.method == "bottleneck":
        after = _beside(spec, base, heads)
        bottleneck.insert(base, after, spec.adapter.bottleneck)
        config = bottleneck.BottleneckConfig(width=spec.adapter.bottleneck, after=after, **shared)
    elif spec.adapter.method == "nola":
        config = nola.NolaConfig(
            r=spec.adapter.rank,
            lora_alpha=spec.adapter.alpha,
            bases=spec.adapter.bases,
            key=derive(spec.run.seed, "nola") % 2**63,
            beside=_beside(spec, base, heads),
            **shared,
        )
        nola.insert(base, config)
    else:
        config = _config(spec, base, shared)
    try:
        with quiet_projections():
            model = get_peft_model(base, config)
    except ValueError as error:
        raise ModelError(f"adapter.targets = {spec.adapter.targets!r}: {first_line(error)}") from error
    train_own(model, spec.adapter.method)
    if spec.adapter.method == "bias" and spec.adapter.layers:
        keep_biases(model, {name for name, _ in model.named_parameters() if block_of(name) in spec.adapter.layers})
    return model


def train_own(model: PeftModel, method: str) -> None:
    """Make trainable what `peft` leaves frozen: parameters of the base, and a prompt that comes from a folder."""
    parts = {
        "full": ("",),
        "bottleneck": (bottleneck.PREFIX,),
        "nola": (nola.PREFIX,),
        "prompt": ("prompt_encoder.", ".modules_to_save."),
        "prefix": ("prompt_encoder.", ".modules_to_save."),
    }.get(method, ())
    for name, parameter in model.named_parameters():
        untouched = ".original_module." in name  # the copy that peft keeps of each trained head
        if not untouched and any(part in name for part in parts):
            parameter.requires_grad_(True)


def keep_biases(model: PeftModel, kept: Collection[str]) -> None:
    """Of a model whose biases are trained, train these parameters alone, and the heads."""
    for name, parameter in model.named_parameters():
        if name not in kept and ".modules_to_save." not in name:
            parameter.requires_grad_(False)


def _refuse_unfit(spec: RunSpec, base: nn.Module) -> None:
    """Raise ModelError where the kind cannot be trained on this base for this task."""
    method, task, layers = spec.adapter.method, spec.model.task, spec.adapter.layers
    refuse_beyond(base, layers)
    why, nearest = "", ""
    if method in ("prompt", "prefix") and task == "image-classification":
        why, nearest = "an image has no tokens to put virtual ones before", "bottleneck"
    elif method == "prompt" and hasattr(base, "score"):
        why, nearest = "a decoder finds the last token of a text by its ids, which a prompt replaces", "prefix"
    elif method == "bias" and not any(name.endswith(".bias") for name in _adaptable(spec, base)):
        where = " in these layers" if layers else ""
        why, nearest = f"this base has no bias{where}", "head" if HEADS[task] else "ia3"
    if method in ("bias", "full") and spec.model.precision == "bf16":
        raise ModelError(
            f'model.precision = "bf16" is illegal with adapter.method = "{method}": what is trained is fp32, and it '
            'trains the base itself. Nearest legal: "fp32".'
        )
    if why:
        raise ModelError(f'adapter.method = "{method}" is illegal here: {why}. Nearest legal: "{nearest}".')
    _refuse_long(spec, base)


def refuse_untrainable(spec: RunSpec, model: PeftModel) -> None:
    """Raise ModelError where a prompt or a prefix does not reach the logits: `peft` and a base may not fit together."""
    method = spec.adapter.method
    if method not in ("prompt", "prefix"):
        return
    prompt = model.prompt_encoder[model.active_adapter].embedding.weight
    device = prompt.device
    rows = {"input_ids": torch.ones((2, 4), dtype=torch.long), "attention_mask": torch.ones((2, 4), dtype=torch.long)}
    try:
        logits = model(**{key: value.to(device) for key, value in rows.items()}).logits.float()
        weights = torch.linspace(-1, 1, logits.numel(), device=device).view_as(logits)
        (gradient,) = torch.autograd.grad((logits * weights).sum(), [prompt], allow_unused=True)
        reason = "" if gradient is not None and bool(gradient.any()) else "it does not reach the logits"
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError) as error:
        reason = first_line(error)
    if reason:
        base = model.get_base_model()
        nearest = "prompt" if method == "prefix" and not hasattr(base, "score") else "bottleneck"
        raise ModelError(
            f'adapter.method = "{method}" is illegal with {type(base).__name__}: {reason}. Nearest legal: "{nearest}".'
        )


def _refuse_long(spec: RunSpec, base: nn.Module) -> None:
    """Virtual tokens take positions, of which a base has only so many."""
    limit = getattr(getattr(base, "config", None), "max_position_embeddings", None)
    tokens, length = spec.adapter.virtual_tokens, spec.model.max_length
    if spec.adapter.method in ("prompt", "prefix") and limit is not None and length + tokens > limit:
        raise ModelError(
            f"adapter.virtual_tokens = {tokens} and model.max_length = {length}: this base has {limit} positions. "
            f"Nearest legal: max_length = {limit - tokens}."
        )


def _heads(spec: RunSpec, base: nn.Module, missing: Iterable[str]) -> list[str]:
    """The modules that are trained whole beside every kind of adapter: the classifier, and what the checkpoint lacks."""
    kept = {name for name in HEADS[spec.model.task] if name in dict(base.named_modules())}
    modules = {name.rpartition(".")[0] for name in missing}
    return sorted(kept | {module for module in modules if module.split(".")[0] not in kept})


def _adaptable(spec: RunSpec, base: nn.Module) -> list[str]:
    """The parameters of the base outside its classifier, in the blocks that are adapted."""
    layers, heads = spec.adapter.layers, HEADS[spec.model.task]
    names = [name for name, _ in base.named_parameters() if name.split(".")[0] not in heads]
    return [name for name in names if not layers or block_of(name) in layers]


def _beside(spec: RunSpec, base: nn.Module, heads: list[str]) -> list[str]:
    """The linear layers that get a bottleneck, or a sum of bases, of their own."""
    layers, method = spec.adapter.layers, spec.adapter.method
    targets: Sequence[str] = bottleneck.OUTPUTS if method == "bottleneck" else _linear(base)
    if not isinstance(spec.adapter.targets, str):
        targets = spec.adapter.targets
    found = [name for name in bottleneck.places(base, targets, heads) if not layers or block_of(name) in layers]
    if not found:
        way_out = 'Nearest legal: "all-linear".'
        if method == "bottleneck":
            way_out = "Name the last layer of its attention and of its feed-forward."
        where = f" in the layers {list(layers)}" if layers else ""
        raise ModelError(
            f"adapter.targets = {spec.adapter.targets!r}: this base has no such linear layer{where} to put a {method} "
            f"at. {way_out}"
        )
    return found


def _linear(base: Any) -> list[str]:
    """What "all-linear" stands for: all linear layers, but for the one that gives a language model's logits."""
    logits = base.get_output_embeddings()
    return [
        name for name, layer in base.named_modules() if isinstance(layer, nn.Linear | Conv1D) and layer is not logits
    ]


def _targets(spec: RunSpec, base: nn.Module) -> str | list[str]:
    """What peft is told to adapt. Where single blocks are, names: peft takes no word together with numbers of blocks."""
    targets, layers = spec.adapter.targets, spec.adapter.layers
    if layers and spec.adapter.method == "ia3":  # whose config knows no numbers
        return modules_of(base, targets, layers)
    if layers and isinstance(targets, str):
        return linear_within(base, layers)
    return targets if isinstance(targets, str) else list(targets)


def _config(spec: RunSpec, base: nn.Module, shared: Mapping[str, Any]) -> PeftConfig:
    """peft's config of each kind that is peft's own, and of the three that train the base itself."""
    adapter = spec.adapter
    rank, alpha, tokens = adapter.rank, adapter.alpha, adapter.virtual_tokens
    targets = _targets(spec, base)
    where = {"target_modules": targets, "layers_to_transform": list(adapter.layers) or None}
    config: PeftConfig
    match adapter.method:
        case "dora":
            config = LoraConfig(r=rank, lora_alpha=alpha, use_dora=True, **where, **shared)
        case "ia3":
            # Without feedforward_modules the outputs of all targets are scaled: one rule for every architecture.
            config = IA3Config(target_modules=targets, feedforward_modules=[], **shared)
        case "vera":
            key = derive(spec.run.seed, "vera") % 2**31
            with quiet_projections():
                config = VeraConfig(r=rank, projection_prng_key=key, save_projection=False, **where, **shared)
        case "adalora":
            # Ranks are pruned by update_and_allocate alone, which is never called: nodes would prune differently.
            config = AdaLoraConfig(init_r=rank, target_r=rank, lora_alpha=alpha, total_step=1, **where, **shared)
        case "prompt":
            config = PromptTuningConfig(num_virtual_tokens=tokens, **shared)
        case "prefix":
            config = PrefixTuningConfig(num_virtual_tokens=tokens, **shared)
        case "bias":
            config = LoraConfig(target_modules=DUMMY_TARGET_MODULES, bias="all", **shared)
        case "head" | "full":
            config = LoraConfig(target_modules=DUMMY_TARGET_MODULES, **shared)
        case _:
            config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=adapter.dropout, **where, **shared)
    return config


def draw_start(spec: RunSpec, model: PeftModel, parameters: Mapping[str, nn.Parameter]) -> None:
    """Write the values at the start of a run into `parameters` (by the names of the layout).

    LoRA's A and W_down of a bottleneck are uniform in ±1/√in (Kaiming with a = √5), B and W_up zero, as `peft` draws
    them, and NOLA's coefficients like the factor that they stand for; AdaLoRA's P and Q are N(0, 0.02²) and its Λ zero; a virtual token is the embedding of a word drawn from the
    vocabulary (Lester et al., arXiv 2104.08691 §3.2); a prefix is N(0, 0.02²). So all kinds but the last two start as
    the base's own function. The scales of IA³, the vectors of VeRA, the magnitudes of DoRA and what the base has
    itself are not drawn: `peft` or the base sets them.
    """
    for name, parameter in parameters.items():
        values = _drawn(spec, name, tuple(parameter.shape), model)
        if values is not None:
            with torch.no_grad():
                parameter.copy_(torch.as_tensor(values))


def _drawn(spec: RunSpec, name: str, shape: tuple[int, ...], model: PeftModel) -> Any:
    """The values of one tensor, or None where it has its own already."""
    method, seed, values = spec.adapter.method, spec.run.seed, None
    module, _, part = name.partition(".lora_")
    if method in ("lora", "dora") and part in ("A.weight", "B.weight"):
        values = _uniform(shape, shape[1], derive(seed, "A", module)) if part == "A.weight" else np.zeros(shape)
    elif method == "adalora" and part in ("A", "B", "E"):
        values = np.zeros(shape) if part == "E" else _normal(shape, derive(seed, part, module))
    elif method == "nola" and nola.PREFIX in name:
        inputs = model.get_submodule(name.rpartition(".")[0]).get_buffer("signs_a").shape[-1]
        values = _uniform(shape, inputs, derive(seed, "A", name)) if name.endswith(".a") else np.zeros(shape)
    elif method == "bottleneck" and bottleneck.PREFIX in name:
        down = name.endswith("_down.weight")
        values = _uniform(shape, shape[1], derive(seed, "down", name)) if down else np.zeros(shape)
    elif method == "prefix" and name == PROMPT:
        values = _normal(shape, derive(seed, "prefix"))
    elif method == "prompt" and name == PROMPT:
        words = model.word_embeddings.weight.detach()
        chosen = generator(derive(seed, "prompt")).integers(0, len(words), shape[0])
        values = words[torch.from_numpy(chosen).to(words.device)]
    return values


def _uniform(shape: tuple[int, ...], inputs: int, key: int) -> Any:
    """Values in ±1/√in, as Kaiming's rule with a = √5 gives them."""
    bound = inputs**-0.5
    return generator(key).uniform(-bound, bound, shape)


def _normal(shape: tuple[int, ...], key: int) -> Any:
    return 0.02 * generator(key).standard_normal(shape)


def methods_of(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The kinds that an adapter_config.json can be of; none where it is of a kind that the spec does not name."""
    kind = config.get("peft_type")
    if kind == "LORA" and config.get("target_modules") == DUMMY_TARGET_MODULES:
        return ("bias",) if config.get("bias") == "all" else ("head", "full")
    if kind == "LORA":
        return ("dora",) if config.get("use_dora") else ("lora",)
    names = {"PROMPT_TUNING": "prompt", "PREFIX_TUNING": "prefix"}
    name = names.get(str(kind), str(kind).lower())
    return (name,) if name in ("ia3", "vera", "adalora", "prompt", "prefix", "bottleneck", "nola") else ()


def first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__


@contextmanager
def quiet_projections() -> Iterator[None]:
    """Without peft's warning that VeRA's projections are drawn anew from their key: that is what is wanted here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Specified to not (save|load) vera_A")
        yield
