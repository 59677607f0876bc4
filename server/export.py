"""An adapter as a folder that `peft.PeftModel.from_pretrained` loads: written without torch."""

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from ..kernels.lowrank import Matrix
from ..protocols.errors import OutputError
from ..protocols.layout import AdapterLayout, Flat, Pair
from ..protocols.update import Description

CONFIG, WEIGHTS, PRIVACY = "adapter_config.json", "adapter_model.safetensors", "privacy.json"


def save_adapter(
    folder: Path, description: Description, adapter: Flat, privacy: Mapping[str, Any] | None = None
) -> None:
    """Write adapter_config.json and adapter_model.safetensors; the folder appears whole or not at all.

    `privacy` is what is promised of the adapter, or said not to be: it goes beside it as privacy.json.

    `adapter` is fp32 over `description.layout`; frozen factors join the trained ones, which raises the rank. An older
    adapter gives way to it. Raises OutputError where the folder cannot be written, or holds something else.
    """
    try:
        if folder.exists() and not _may_be_replaced(folder):
            raise OutputError(f"{folder}: exists and is no adapter folder; name another, or remove it")
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
            new = Path(scratch, "new")
            new.mkdir()
            tensors, config = one_adapter(description, adapter)
            save_file(tensors, new / WEIGHTS, metadata={"format": "pt"})
            text = json.dumps(config, indent=2, sort_keys=True)
            (new / CONFIG).write_text(text + "\n", encoding="utf-8")
            if privacy is not None:
                (new / PRIVACY).write_text(json.dumps(privacy, indent=2) + "\n", encoding="utf-8")
            if folder.exists():
                os.replace(folder, Path(scratch, "old"))
            os.replace(new, folder)
    except (OSError, SafetensorError) as error:
        raise OutputError(f"{folder}: the adapter cannot be written ({error})") from error


def one_adapter(description: Description, adapter: Flat) -> tuple[dict[str, Matrix], dict[str, Any]]:
    """The tensors by peft's names, and adapter_config.json: frozen factors as further components of the trained ones."""
    layout, config = description.layout, dict(description.config)
    tensors = {name: view.copy() for name, view in layout.split(adapter).items()}
    frozen = {pair: (tensors.pop(pair.frozen[0]), tensors.pop(pair.frozen[1])) for pair in _with_frozen(layout)}
    # Components that were never filled are zero in every B: peft wants one rank, so the fullest module decides.
    filled = max((1 + int(np.flatnonzero(b.any(axis=0)).max(initial=-1)) for b, _ in frozen.values()), default=0)
    for pair, (b, a) in frozen.items():
        tensors[pair.b.name] = np.concatenate([tensors[pair.b.name], b[:, :filled]], axis=1)
        tensors[pair.a.name] = np.concatenate([tensors[pair.a.name], a[:filled]])
    if filled:
        rank, before = layout.rank + filled, layout.rank
        # peft scales by alpha / r, or by alpha / √r where rsLoRA is on: ΔW must not change.
        growth = (rank / before) ** (0.5 if config.get("use_rslora") else 1.0)
        config |= {"r": rank, "lora_alpha": config["lora_alpha"] * growth}
    return tensors, config


def _with_frozen(layout: AdapterLayout) -> list[Pair]:
    return [pair for pair in layout.pairs if pair.frozen[0] in layout.offsets]


def _may_be_replaced(folder: Path) -> bool:
    return folder.is_dir() and ((folder / CONFIG).is_file() or not any(folder.iterdir()))
