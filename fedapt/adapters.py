"""Adapter folders in peft's format: reading one without torch, a look inside, and the merge into the base."""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, deserialize

from .kernels.lowrank import LowRank, Matrix
from .protocols.errors import ModelError, OutputError
from .protocols.layout import A_SUFFIX, B_SUFFIX

FLOATS = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}


def describe_adapter(folder: Path) -> dict[str, Any]:
    """What an adapter folder holds. Raises ModelError where it is none."""
    config, tensors = read_adapter(folder)
    modules = []
    for name, a in sorted(tensors.items()):
        module = name.removesuffix(A_SUFFIX)
        if name.endswith(A_SUFFIX) and module + B_SUFFIX in tensors:
            b = tensors[module + B_SUFFIX]
            modules.append(
                {
                    "module": module,
                    "in": a.shape[1],
                    "out": b.shape[0],
                    "rank": a.shape[0],
                    "norm": LowRank(b, a).norm(),
                }
            )
    others = {n: list(t.shape) for n, t in sorted(tensors.items()) if not n.endswith((A_SUFFIX, B_SUFFIX))}
    return {
        "folder": str(folder),
        "base": config.get("base_model_name_or_path"),
        "method": config.get("peft_type"),
        "rank": config.get("r"),
        "alpha": config.get("lora_alpha"),
        "parameters": sum(t.size for t in tensors.values()),
        "modules": modules,
        "others": others,
    }


def describe_text(facts: Mapping[str, Any]) -> str:
    head = (
        f"{facts['folder']}: {facts['method']} of rank {facts['rank']} (alpha {facts['alpha']}) on {facts['base']}, "
        f"{facts['parameters']:,} parameters"
    )
    modules = [
        f"  {m['module']}  {m['out']}×{m['in']}  rank {m['rank']}  ‖BA‖ {m['norm']:.4g}" for m in facts["modules"]
    ]
    others = [f"  {name}  {'×'.join(map(str, shape))}" for name, shape in facts["others"].items()]
    return "\n".join([head, *modules, *others])


UNMERGEABLE = ("BOTTLENECK", "PROMPT_TUNING", "PREFIX_TUNING")
HEADS = (".classifier.weight", ".classifier.out_proj.weight", ".score.weight")


def merge_into_base(folder: Path, target: Path, base: str | None) -> None:
    """Write base + adapter as an ordinary model folder, whole or not at all. Raises ModelError or OutputError."""
    from .client.models import load_adapted_folder

    if target.exists():
        raise OutputError(f"{target}: exists already; name another folder.")
    config, tensors = read_adapter(folder)
    kind = str(config.get("peft_type"))
    if kind in UNMERGEABLE:
        raise ModelError(
            f"{folder}: a {kind.lower()} is no change of weights and cannot be merged; load it on its base."
        )
    heads = [t.shape[0] for name, t in tensors.items() if name.endswith(HEADS)]
    origin = base or str(config.get("base_model_name_or_path") or "")
    model, processor = load_adapted_folder(folder, origin, config, heads[-1] if heads else None)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        model.merge_and_unload().save_pretrained(scratch)
        if processor is not None:
            processor.save_pretrained(scratch)
        scratch.chmod(0o755)
        scratch.rename(target)
    except OSError as error:
        raise OutputError(f"{target}: cannot be written ({error.strerror or error})") from error


def read_adapter(folder: Path) -> tuple[dict[str, Any], dict[str, Matrix]]:
    """The config and the tensors by name. Raises ModelError where the folder holds no adapter, or a damaged one."""
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ModelError(f"{folder}: damaged adapter (adapter_config.json holds no table).")
        return config, _floats((folder / "adapter_model.safetensors").read_bytes())
    except FileNotFoundError as error:
        raise ModelError(f"{folder}: no adapter folder in peft's format ({error.filename} is missing).") from None
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise ModelError(f"{folder}: damaged adapter ({error}).") from error


def _floats(data: bytes) -> dict[str, Matrix]:
    """Tensors of a safetensors file; bf16, which NumPy does not know, becomes fp32 without loss."""
    tensors = {}
    for name, found in deserialize(data):  # type: ignore[no-untyped-call]
        kind, content = found["dtype"], found["data"]
        if kind == "BF16":
            values = (np.frombuffer(content, "<u2").astype(np.uint32) << 16).view(np.float32)
        elif kind in FLOATS:
            values = np.frombuffer(content, FLOATS[kind])
        else:
            raise ValueError(f"{name} is of type {kind}: save it as fp32, fp16 or bf16")
        tensors[name] = values.reshape(found["shape"])
    return tensors
