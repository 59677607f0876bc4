"""An adapter as a folder that `peft.PeftModel.from_pretrained` loads: written without torch."""

import json
import os
import shutil
import tempfile
from pathlib import Path

from safetensors.numpy import save_file

from ..protocols.errors import OutputError
from ..protocols.layout import Flat
from ..protocols.update import Description


def save_adapter(folder: Path, description: Description, adapter: Flat) -> None:
    """Write adapter_config.json and adapter_model.safetensors; the folder appears whole or not at all.

    `adapter` is fp32 over `description.layout`. Raises OutputError where the folder cannot be written.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        tensors = {name: view.copy() for name, view in description.layout.split(adapter).items()}
        save_file(tensors, scratch / "adapter_model.safetensors", metadata={"format": "pt"})
        config = json.dumps(dict(description.config), indent=2, sort_keys=True)
        (scratch / "adapter_config.json").write_text(config + "\n", encoding="utf-8")
        scratch.chmod(0o755)
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(scratch, folder)
    except OSError as error:
        raise OutputError(f"{folder}: the adapter cannot be written ({error})") from error
