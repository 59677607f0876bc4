"""Adapter folders in peft's format: a look inside, and the merge into the base."""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.numpy import load_file

from .kernels.lowrank import LowRank
from .protocols.errors import ModelError, OutputError
from .protocols.layout import A_SUFFIX, B_SUFFIX


def describe_adapter(folder: Path) -> dict[str, Any]:
    """What an adapter folder holds. Raises ModelError where it is none."""
    config, tensors = _read(folder)
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


def merge_into_base(folder: Path, target: Path, base: str | None) -> None:
    """Write base + adapter as an ordinary model folder, whole or not at all. Raises ModelError or OutputError."""
    from .client.models import load_adapted_folder

    if target.exists():
        raise OutputError(f"{target}: exists already; name another folder.")
    config, tensors = _read(folder)
    heads = [t.shape[0] for name, t in tensors.items() if not name.endswith((A_SUFFIX, B_SUFFIX)) and t.ndim == 2]
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


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        return config, load_file(folder / "adapter_model.safetensors")
    except FileNotFoundError as error:
        raise ModelError(f"{folder}: no adapter folder in peft's format ({error.filename} is missing).") from None
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError(f"{folder}: damaged adapter ({error}).") from error
