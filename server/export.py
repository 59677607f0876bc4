"""An adapter as a folder that `peft.PeftModel.from_pretrained` loads: written without torch."""

import json
import os
import tempfile
from pathlib import Path

from safetensors import SafetensorError
from safetensors.numpy import save_file

from ..protocols.errors import OutputError
from ..protocols.layout import Flat
from ..protocols.update import Description

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def save_adapter(folder: Path, description: Description, adapter: Flat) -> None:
    """Write adapter_config.json and adapter_model.safetensors; the folder appears whole or not at all.

    `adapter` is fp32 over `description.layout`. An older adapter gives way to it. Raises OutputError where the folder
    cannot be written, or holds something else than an adapter.
    """
    try:
        if folder.exists() and not _may_be_replaced(folder):
            raise OutputError(f"{folder}: exists and is no adapter folder; name another, or remove it")
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
            new = Path(scratch, "new")
            new.mkdir()
            tensors = {name: view.copy() for name, view in description.layout.split(adapter).items()}
            save_file(tensors, new / WEIGHTS, metadata={"format": "pt"})
            config = json.dumps(dict(description.config), indent=2, sort_keys=True)
            (new / CONFIG).write_text(config + "\n", encoding="utf-8")
            if folder.exists():
                os.replace(folder, Path(scratch, "old"))
            os.replace(new, folder)
    except (OSError, SafetensorError) as error:
        raise OutputError(f"{folder}: the adapter cannot be written ({error})") from error


def _may_be_replaced(folder: Path) -> bool:
    return folder.is_dir() and ((folder / CONFIG).is_file() or not any(folder.iterdir()))
