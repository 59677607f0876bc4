"""What of this machine a run depends on."""

import os
import platform
import shutil
import sys
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Literal

import psutil
import torch

TESTED = ("torch", "transformers", "peft", "flwr", "datasets")


@dataclass(frozen=True)
class Check:
    """One line: what was looked at, how it stands, and what to do where it does not."""

    name: str
    status: Literal["fine", "note", "fails"]
    text: str

    def as_dict(self) -> dict[str, str]:
        return asdict(self)


def checks() -> list[Check]:
    """All checks, in the order in which a newcomer would ask."""
    return [_python(), *(_package(name) for name in TESTED), _processor(), _gpu(), _memory(), _disk(), _hub()]


def checks_text(found: list[Check]) -> str:
    marks = {"fine": "✓", "note": "·", "fails": "✗"}
    return "\n".join(f"{marks[check.status]} {check.name:<13} {check.text}" for check in found)


def _python() -> Check:
    enough = sys.version_info >= (3, 11)
    text = platform.python_version() + ("" if enough else ": fedapt needs 3.11 or newer")
    return Check("python", "fine" if enough else "fails", text)


def _package(name: str) -> Check:
    try:
        return Check(name, "fine", version(name))
    except PackageNotFoundError:
        return Check(name, "fails", f"missing: pip install {name}")


def _processor() -> Check:
    capability = torch.backends.cpu.get_cpu_capability()
    text = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, {capability}"
    return Check("processor", "fine", text)


def _gpu() -> Check:
    if not torch.cuda.is_available():
        return Check("gpu", "note", "none: runs go on the processor")
    card = torch.cuda.get_device_properties(0)
    return Check("gpu", "fine", f"{card.name}, {card.total_memory / 2**30:.0f} GiB")


def _memory() -> Check:
    free = psutil.virtual_memory().available / 2**30
    return Check("memory", "fine" if free >= 2 else "note", f"{free:.1f} GiB free; the demo takes 1.5")


def _disk() -> Check:
    free = shutil.disk_usage(".").free / 2**30
    return Check("disk", "fine" if free >= 1 else "note", f"{free:.1f} GiB free here")


def _hub() -> Check:
    offline = os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0")
    text = (
        "offline (HF_HUB_OFFLINE): models and data come from local folders"
        if offline
        else "online, if there is a network"
    )
    return Check("hub", "note" if offline else "fine", text)
