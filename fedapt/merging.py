"""Several LoRA adapters of one base ⇒ one, offline: `fedapt adapter merge`.

What an adapter adds to a module is `ΔW = s·B·A`, and it is these changes that are merged: averaging A's and B's each
for itself gives another matrix, and depends on a gauge that nobody chose. `mean` and the soups stay in factors and are
exact up to the rank that is kept. The other rules look at single entries of ΔW; they work on one dense module at a
time. The result is cut back to a rank by SVD, and how much that loses is reported.

Two rules need the base and data (`measuring.py`): `greedy-soup` scores adapters, and `fisher` asks of each entry how
sure each adapter is of it. All others read the folders alone.
"""

import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from .adapters import read_adapter
from .kernels.lowrank import LowRank, Matrix, weighted_sum
from .kernels.merging import breadcrumbs, greedy_soup, pcb, shares, ties, weighted_mean
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
ON_DATA = ("fisher", "greedy-soup")
METHODS = ("mean", "soup", *ENTRYWISE, *ON_DATA)
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


@dataclass(frozen=True)
class _Rule:
    """How adapters become one of this rank; `information` is each adapter's, by the names of its tensors (fisher)."""

    method: str
    rank: int
    options: Mapping[str, float]
    information: Sequence[Mapping[str, Matrix]] = ()

    def merge(self, adapters: Sequence[Adapter], parts: Matrix) -> tuple[dict[str, Matrix], float]:
        """The tensors of the result by peft's names, and what its rank loses, relative (Frobenius)."""
        tensors: dict[str, Matrix] = {}
        missed = wanted = 0.0
        for module in adapters[0].changes:
            merged = self._change(module, [adapter.changes[module] for adapter in adapters], parts)
            best = merged.truncate(self.rank)
            length, distance = merged.norm_and_distance(best)
            wanted += length**2
            missed += distance**2
            tensors |= {module + A_SUFFIX: best.a, module + B_SUFFIX: best.b}
        for name, values in adapters[0].others.items():
            stacked = np.stack([np.ravel(adapter.others[name]) for adapter in adapters])
            merged_values = self._informed(name, stacked, parts) if self.information else weighted_mean(stacked, parts)
            tensors[name] = merged_values.reshape(values.shape)
        return tensors, float(np.sqrt(missed / wanted)) if wanted > 0 else 0.0

    def _change(self, module: str, terms: Sequence[LowRank], parts: Matrix) -> LowRank:
        scale = self.options["scale"]
        if self.method not in ENTRYWISE and not self.information:
            return weighted_sum([(scale * part, term) for part, term in zip(parts.tolist(), terms, strict=True)])
        shape = terms[0].b.shape[0], terms[0].a.shape[1]
        dense = np.stack([np.ravel(term.b @ term.a) for term in terms])
        if self.information:
            merged = scale * self._informed(module, dense, parts)
        else:
            merged = ENTRYWISE[self.method](dense, parts, **self.options)
        return LowRank(merged.reshape(shape).astype(np.float64), np.eye(shape[1]))

    def _informed(self, name: str, values: Matrix, parts: Matrix) -> Matrix:
        from .measuring import informed

        return informed(values, np.stack([np.ravel(known[name]) for known in self.information]), parts)


def merge_adapters(
    folders: Sequence[Path],
    out: Path,
    method: str = "mean",
    *,
    weights: Sequence[float] | None = None,
    rank: int | None = None,
    density: float | None = None,
    scale: float = 1.0,
    data: Path | None = None,
) -> dict[str, Any]:
    """Merge LoRA adapter folders in peft's format into `out`, and say what was done.

    `method` is one of METHODS; `soup` is the mean with equal weights. `rank` is that of the result, by default the
    largest among the inputs, whose ranks and alphas may differ; the result has alpha = rank, so a scaling of 1.
    `density` (share of entries kept in each module) belongs to `ties`, `breadcrumbs` and `pcb`; `scale` multiplies
    the merged change. Trained tensors outside LoRA pairs become their weighted mean, whatever the method, because the
    change of such a tensor is not known without the base; with `fisher` they are merged as the rest is.

    `data` is a file of rows for the two methods of ON_DATA, which load the base that the folders name. `greedy-soup`
    tries the best adapter together with each of the others, best first, and takes in what does not lower the score
    (accuracy, else the loss) of the result; `evaluation` is then what the result scores, and `weights` say who is in it.
    `fisher` weighs each entry of ΔW with what each adapter knows of it, in all of these rows: that is one number for
    each entry of each adapted weight and adapter, in memory.

    The result's `error` is ‖merged − kept‖/‖merged‖ over all modules (Frobenius): 0 for a rank that is large enough.
    Raises SpecError for a method or a number that cannot be, ModelError for adapters that cannot be merged, DataError
    for rows that cannot be read, and OutputError where `out` exists or cannot be written.
    """
    parts = _check(folders, out, method, weights=weights, rank=rank, density=density, scale=scale, data=data)
    adapters = [_load(folder) for folder in folders]
    _check_alike(adapters)
    kept = rank or max(term.rank for adapter in adapters for term in adapter.changes.values())
    rule = _Rule(method, kept, {"scale": scale} | ({} if density is None else {"density": density}))
    evaluation: dict[str, float] = {}
    if method == "fisher" and data is not None:
        rule = replace(rule, information=_information(folders, data))
    if method == "greedy-soup" and data is not None:
        parts, evaluation = _greedy(rule, adapters, data)
    tensors, error = rule.merge(adapters, parts)
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
    } | ({"evaluation": evaluation} if evaluation else {})


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
    lines = [head, loss + ("; a larger --rank loses less" if facts["error"] else "")]
    if "evaluation" in facts:
        taken = [folder for folder, weight in zip(facts["adapters"], facts["weights"], strict=True) if weight > 0]
        reached = ", ".join(f"{name} {value:.4g}" for name, value in facts["evaluation"].items())
        lines.append(f"in the soup: {', '.join(taken)}; together {reached}")
    return "\n".join(lines)


def _check(
    folders: Sequence[Path],
    out: Path,
    method: str,
    *,
    weights: Sequence[float] | None,
    rank: int | None,
    density: float | None,
    scale: float,
    data: Path | None,
) -> Matrix:
    """The weights, summing to 1. Raises before anything is read."""
    if method not in METHODS:
        raise SpecError(f"--method {method}: no such method. There are {', '.join(METHODS)}.")
    if method in ON_DATA and data is None:
        raise SpecError(f"--method {method}: it looks at data; name rows that no adapter was trained on: --data FILE.")
    if method not in ON_DATA and data is not None:
        raise SpecError(f"--data {data}: {method} looks at no data; it belongs to {', '.join(ON_DATA)}.")
    if method in ("soup", "greedy-soup") and weights is not None:
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


def _information(folders: Sequence[Path], data: Path) -> list[dict[str, Matrix]]:
    """What each adapter knows of its tensors, in these rows."""
    from .measuring import measured

    return [measured(folder, data).information() for folder in folders]


def _greedy(rule: _Rule, adapters: Sequence[Adapter], data: Path) -> tuple[Matrix, dict[str, float]]:
    """The weights of the greedy soup, and what it scores.

    An adapter stands here for a unit vector, so that a soup is the vector of its weights.
    """
    from .measuring import measured

    every = shares(None, len(adapters))
    with tempfile.TemporaryDirectory() as scratch:
        _save(Path(scratch, "soup"), adapters[0].config, rule.merge(adapters, every)[0], rule.rank)
        bench = measured(Path(scratch, "soup"), data)

    def score(parts: Matrix) -> float:
        scores = bench.scores(rule.merge(adapters, parts)[0])
        value = scores.get("accuracy", -scores["loss"])
        return -np.inf if np.isnan(value) else value

    _, taken = greedy_soup(np.eye(len(adapters), dtype=np.float32), score)
    parts = shares([float(number in taken) for number in range(len(adapters))], len(adapters))
    return parts, bench.scores(rule.merge(adapters, parts)[0])


def _save(out: Path, config: Mapping[str, Any], tensors: Mapping[str, Matrix], rank: int) -> None:
    roles: dict[str, Role] = {A_SUFFIX: "A", B_SUFFIX: "B"}
    layout = AdapterLayout(
        TensorSpec(name, values.shape, next((role for suffix, role in roles.items() if name.endswith(suffix)), "other"))
        for name, values in tensors.items()
    )
    plain = {"use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}, "init_lora_weights": True}
    settings = {**config, **plain, "r": rank, "lora_alpha": rank, "inference_mode": True}
    save_adapter(out, Description(layout, layout.join(tensors), settings, ""), layout.join(tensors))
