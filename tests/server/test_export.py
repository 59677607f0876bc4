import json
import os
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from fedapt.protocols.errors import OutputError
from fedapt.protocols.layout import AdapterLayout, TensorSpec
from fedapt.protocols.update import Description
from fedapt.server import export
from fedapt.server.export import save_adapter

LAYOUT = AdapterLayout(
    [
        TensorSpec("base_model.model.q.lora_A.weight", (2, 3), "A"),
        TensorSpec("base_model.model.q.lora_B.weight", (4, 2), "B"),
        TensorSpec("base_model.model.score.bias", (), "other"),
    ]
)
ADAPTER = np.random.default_rng(0).standard_normal(LAYOUT.size).astype(np.float32)
DESCRIPTION = Description(LAYOUT, np.zeros(LAYOUT.size, np.float32), {"r": 2, "peft_type": "LORA"}, "digest")
FILES = ["adapter_config.json", "adapter_model.safetensors"]


def listed(folder: Path) -> list[str]:
    """Everything in a folder, hidden files too."""
    return sorted(os.listdir(folder))


def test_the_folder_is_in_pefts_format(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "adapter"
    save_adapter(folder, DESCRIPTION, ADAPTER)
    assert listed(folder) == FILES
    assert listed(folder.parent) == ["adapter"]
    assert json.loads((folder / FILES[0]).read_text()) == DESCRIPTION.config
    tensors = load_file(folder / FILES[1])
    assert set(tensors) == {t.name for t in LAYOUT.tensors}
    for name, view in LAYOUT.split(ADAPTER).items():
        assert tensors[name].dtype == np.float32
        assert np.array_equal(tensors[name], view)
    with safe_open(folder / FILES[1], "np") as file:
        assert file.metadata() == {"format": "pt"}


def test_the_same_adapter_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        save_adapter(tmp_path / name, DESCRIPTION, ADAPTER)
    for file in FILES:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_others_may_read_it_as_far_as_the_umask_allows(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.mkdir()
    save_adapter(tmp_path / "adapter", DESCRIPTION, ADAPTER)
    assert (tmp_path / "adapter").stat().st_mode == plain.stat().st_mode


def test_an_older_adapter_gives_way(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    save_adapter(folder, DESCRIPTION, ADAPTER)
    (folder / "README.md").write_text("of the old one")
    save_adapter(folder, DESCRIPTION, -ADAPTER)
    assert listed(folder) == FILES
    assert listed(tmp_path) == ["adapter"]
    tensors = load_file(folder / FILES[1])
    assert all(np.array_equal(tensors[name], -view) for name, view in LAYOUT.split(ADAPTER).items())


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    save_adapter(tmp_path, DESCRIPTION, ADAPTER)
    assert listed(tmp_path) == FILES


def test_what_is_no_adapter_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    for target in (tmp_path, tmp_path / "thesis.tex"):
        with pytest.raises(OutputError, match="exists and is no adapter folder; name another"):
            save_adapter(target, DESCRIPTION, ADAPTER)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"
    assert listed(tmp_path) == ["thesis.tex"]


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(OutputError, match="adapter: the adapter cannot be written"):
        save_adapter(tmp_path / "file" / "adapter", DESCRIPTION, ADAPTER)


@pytest.mark.parametrize("old", [False, True], ids=["new", "over an old one"])
def test_a_write_that_fails_half_way_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: bool
) -> None:
    folder = tmp_path / "adapter"
    if old:
        save_adapter(folder, DESCRIPTION, ADAPTER)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "save_file", full)
    with pytest.raises(OutputError, match="No space left on device"):
        save_adapter(folder, DESCRIPTION, -ADAPTER)
    assert listed(tmp_path) == (["adapter"] if old else [])
    if old:
        assert np.array_equal(load_file(folder / FILES[1])["base_model.model.score.bias"], ADAPTER[-1])
