"""Several LoRA adapters of one base ⇒ one, offline and without the base: `fedapt adapter merge`.

What an adapter adds to a module is `ΔW = s·B·A`, and it is these changes that are merged: averaging A's and B's each
for itself gives another matrix, and depends on a gauge that nobody chose. `mean` and `soup` stay in factors and are
exact up to the rank that is kept. The other rules look at single entries of ΔW; they work on one dense module at a
time. The result is cut back to a rank by SVD, and how much that loses is reported.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .adapters import read_adapter
from .kernels.lowrank import LowRank, Matrix, weighted_sum
from .kernels.merging import breadcrumbs, pcb, shares, ties, weighted_mean
from .protocols.errors import ModelError, OutputError, SpecError
from .protocols.layout import A_SUFFIX, B_SUFFIX, AdapterLayout, Role, TensorSpec
from .protocols.update import Description
from .server.export import save_adapter

# Rules for the entries of one module: (K, n) changes and K weights ⇒ (n,).
ENTRYWISE: dict[str, Callable[..., Matrix]] = {
    "ties": ties,
    "breadcrumbs": lambda changes, weights, **options: breadcrumbs(changes, changes.shape[1:], weights, **options),
    "pcb": pcb,
}
METHODS = ("mean", "soup", *ENTRYWISE)
ELSEWHERE = {
    "fisher": "it needs each adapter's Fisher information, which its folder does not hold",
    "greedy-soup": "it needs a score on held-out data",
}
# Other ways of drawing the first factors (PiSSA, OLoRA, CorDA, LoftQ) change the base too.
PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")
ROUNDING = 1e-7  # of the fp32 in which the result is written


@dataclass(frozen=True)
class Adapter:
    """One input: `changes` are the scaled products `s·B·A` by module (float64), `others` all else that was trained."""

    folder: Path
    config: Mapping[str, Any]
    changes: Mapping[str, LowRank]
    others: Mapping[str, Matrix]


def merge_adapters(
    folders: Sequence[Path],
    out: Path,
    method: str = "mean",
    *,
    weights: Sequence[float] | None = None,
    rank: int | None = None,
    density: float | None = None,
    scale: float = 1.0,
) -> dict[str, Any]:
    """Merge LoRA adapter folders in peft's format into `out`, and say what was done.

    `method` is one of METHODS; `soup` is the mean with equal weights. `rank` is that of the result, by default the
    largest among the inputs, whose ranks and alphas may differ; the result has alpha = rank, so a scaling of 1.
    `density` (share of entries kept in each module) belongs to `ties`, `breadcrumbs` and `pcb`; `scale` multiplies
    the merged change. Trained tensors outside LoRA pairs become their weighted mean, whatever the method, because the
    change of such a tensor is not known without the base.

    The result's `error` is ‖merged − kept‖/‖merged‖ over all modules (Frobenius): 0 for a rank that is large enough.
    Raises SpecError for a method or a number that cannot be, ModelError for adapters that cannot be merged, and
    OutputError where `out` exists or cannot be written.
    """
    parts = _check(folders, out, method, weights=weights, rank=rank, density=density, scale=scale)
    adapters = [_load(folder) for folder in folders]
    _check_alike(adapters)
    kept = rank or max(term.rank for adapter in adapters for term in adapter.changes.values())
    options = {"scale": scale} | ({} if density is None else {"density": density})
    tensors: dict[str, Matrix] = {}
    missed = wanted = 0.0
    for module in adapters[0].changes:
        merged = _merge([adapter.changes[module] for adapter in adapters], method, parts, options)
        best = merged.truncate(kept)
        length, distance = merged.norm_and_distance(best)
        wanted += length**2
        missed += distance**2
        tensors |= {module + A_SUFFIX: best.a, module + B_SUFFIX: best.b}
    error = float(np.sqrt(missed / wanted)) if wanted > 0 else 0.0
    for name, values in adapters[0].others.items():
        stacked = np.stack([np.ravel(adapter.others[name]) for adapter in adapters])
        tensors[name] = weighted_mean(stacked, parts).reshape(values.shape)
    _save(out, adapters[0].config, tensors, kept)
    return {
        "folder": str(out),
        "method": method,
        "adapters": [str(folder) for folder in folders],
        "weights": parts.tolist(),
        "rank": kept,
        "modules": len(adapters[0].changes),
        "others": len(adapters[0].others),
        "error": error if error > ROUNDING else 0.0,
    }


def parse_weights(text: str | None) -> list[float] | None:
    """The numbers of `--weights 1,2`. Raises SpecError."""
    try:
        return None if text is None else [float(part) for part in text.split(",")]
    except ValueError:
        raise SpecError(f"--weights {text}: write numbers with commas between them, as in 1,2.") from None


def merged_text(facts: Mapping[str, Any]) -> str:
    head = (
        f"{facts['folder']}: {facts['method']} of {len(facts['adapters'])} adapters, rank {facts['rank']}, "
        f"{facts['modules']} modules, {facts['others']} other tensors"
    )
    loss = f"lost by cutting to this rank: {facts['error']:.2%} of the merged change (Frobenius)"
    return "\n".join([head, loss + ("; a larger --rank loses less" if facts["error"] else "")])


def _check(
    folders: Sequence[Path],
    out: Path,
    method: str,
    *,
    weights: Sequence[float] | None,
    rank: int | None,
    density: float | None,
    scale: float,
) -> Matrix:
    """The weights, summing to 1. Raises before anything is read."""
    if method not in METHODS:
        reason = f"{ELSEWHERE[method]}; call fedapt.kernels.merging" if method in ELSEWHERE else "no such method"
        raise SpecError(f"--method {method}: {reason}. There are {', '.join(METHODS)}.")
    if method == "soup" and weights is not None:
        raise SpecError("--weights: a soup weighs all adapters equally; use --method mean.")
    if density is not None and method not in ENTRYWISE:
        raise SpecError(f"--density: {method} keeps every entry; it belongs to {', '.join(ENTRYWISE)}.")
    if not np.isfinite(scale) or (rank is not None and rank < 1):
        raise SpecError(f"--scale {scale}, --rank {rank}: scale must be finite, rank at least 1.")
    if out.exists():
        raise OutputError(f"{out}: exists already; name another folder.")
    try:
        if method in ENTRYWISE and density is not None:
            ENTRYWISE[method](np.zeros((1, 1), np.float32), None, density=density)
        return shares(weights, len(folders))
    except ValueError as error:
        raise SpecError(f"adapter merge: {error}.") from None


def _load(folder: Path) -> Adapter:
    """Raises ModelError for anything but a plain LoRA adapter whose factors fit each other and its config."""
    config, tensors = read_adapter(folder)
    unusual = [key for key in ("use_dora", "lora_bias", "target_parameters", "layer_replication") if config.get(key)]
    if config.get("peft_type") != "LORA" or unusual or config.get("init_lora_weights") not in PLAIN_STARTS:
        what = ", ".join([*unusual, f"peft_type {config.get('peft_type')}", f"start {config.get('init_lora_weights')}"])
        raise ModelError(f"{folder}: only plain LoRA can be merged, for its change is B·A alone (this has {what}).")
    for name, values in tensors.items():
        if not np.isfinite(values).all():
            raise ModelError(f"{folder}: {name} holds values that are not finite; this adapter is broken.")
    modules = sorted({re.sub(r"\.lora_[AB]\.weight$", "", name) for name in tensors if ".lora_" in name})
    changes = {module: _change(folder, config, tensors, module) for module in modules}
    if not changes:
        raise ModelError(f"{folder}: holds no LoRA factor, so there is nothing to merge.")
    return Adapter(folder, config, changes, {n: t for n, t in sorted(tensors.items()) if ".lora_" not in n})


def _change(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Matrix], module: str) -> LowRank:
    """`s·B·A` of one module, float64."""
    a, b = tensors.get(module + A_SUFFIX), tensors.get(module + B_SUFFIX)
    if a is None or b is None:
        raise ModelError(f"{folder}: {module} lacks a factor; merging needs its lora_A.weight and its lora_B.weight.")
    rank = _setting(config, "rank_pattern", "r", module)
    if a.ndim != 2 or b.ndim != 2 or not a.shape[0] == b.shape[1] == rank:
        raise ModelError(
            f"{folder}: {module} has A {a.shape} and B {b.shape}, but rank {rank:g} needs A (r, in) and B (out, r)."
        )
    scaling = _setting(config, "alpha_pattern", "lora_alpha", module) / (
        rank**0.5 if config.get("use_rslora") else rank
    )
    return LowRank(scaling * b.astype(np.float64), a.astype(np.float64))


def _setting(config: Mapping[str, Any], pattern: str, general: str, module: str) -> float:
    """A module's rank or alpha; peft lets patterns on the end of a module's name override the general one."""
    name = module.removeprefix("base_model.model.")
    exceptions = config.get(pattern) or {}
    value = next((v for key, v in exceptions.items() if re.match(rf"(.*\.)?({key})$", name)), config.get(general))
    if not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise ModelError(f"adapter_config.json: {general} = {value!r} for {module}; it must be a number above 0.")
    return float(value)


def _check_alike(adapters: Sequence[Adapter]) -> None:
    """Raises ModelError unless all adapters change the same tensors of the same base."""
    first = adapters[0]
    for other in adapters[1:]:
        both = f"{first.folder} and {other.folder}"
        bases = [adapter.config.get("base_model_name_or_path") for adapter in (first, other)]
        if bases[0] != bases[1]:
            raise ModelError(f"{both} have different bases: {bases[0]} and {bases[1]}.")
        shapes, others = _shapes(first), _shapes(other)
        if odd := sorted(shapes.keys() ^ others.keys()):
            raise ModelError(
                f"{both} adapt different modules: {odd[0]} and {len(odd) - 1} more are in one of them alone."
            )
        if wrong := [name for name in shapes if shapes[name] != others[name]]:
            raise ModelError(f"{both} differ in {wrong[0]}: {shapes[wrong[0]]} and {others[wrong[0]]}.")


def _shapes(adapter: Adapter) -> dict[str, tuple[int, ...]]:
    changes = {name: (term.b.shape[0], term.a.shape[1]) for name, term in adapter.changes.items()}
    return changes | {name: values.shape for name, values in adapter.others.items()}


def _merge(terms: Sequence[LowRank], method: str, parts: Matrix, options: Mapping[str, float]) -> LowRank:
    if method not in ENTRYWISE:
        return weighted_sum([(options["scale"] * part, term) for part, term in zip(parts.tolist(), terms, strict=True)])
    shape = terms[0].b.shape[0], terms[0].a.shape[1]
    dense = np.stack([np.ravel(term.b @ term.a) for term in terms])
    merged = ENTRYWISE[method](dense, parts, **options).reshape(shape)
    return LowRank(merged.astype(np.float64), np.eye(shape[1]))


def _save(out: Path, config: Mapping[str, Any], tensors: Mapping[str, Matrix], rank: int) -> None:
    roles: dict[str, Role] = {A_SUFFIX: "A", B_SUFFIX: "B"}
    layout = AdapterLayout(
        TensorSpec(name, values.shape, next((role for suffix, role in roles.items() if name.endswith(suffix)), "other"))
        for name, values in tensors.items()
    )
    plain = {"use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}, "init_lora_weights": True}
    settings = {**config, **plain, "r": rank, "lora_alpha": rank, "inference_mode": True}
    save_adapter(out, Description(layout, layout.join(tensors), settings, ""), layout.join(tensors))
