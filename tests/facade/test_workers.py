"""`--workers`: the same bytes in the folder, one copy of the base in memory, and a run that goes on after a kill."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from fedapt.protocols.spec import RunSpec
from fedapt.simulation import run

from .running import in_process

ROUNDS = 8
ADAPTER = "adapter/adapter_model.safetensors"


def simulate(spec: Path, out: Path, *options: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-P", "-m", "fedapt.cli", "simulate", str(spec), "--out", str(out), *options]
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True)


@pytest.mark.slow
def test_the_adapter_is_the_same_to_the_byte(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedapt.sim.grid.PORTION", 1)
    for count in (1, 2):
        code, _, err = in_process(capsys, "simulate", tiny, "--out", tmp_path / str(count), "--workers", count)
        assert code == 0, err
    assert (tmp_path / "1" / ADAPTER).read_bytes() == (tmp_path / "2" / ADAPTER).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), (signal.SIGKILL, -9)],
    ids=["interrupted", "killed"],
)
def test_a_run_that_is_stopped_leaves_nobody_and_goes_on(tiny: Path, tmp_path: Path, number: int, code: int) -> None:
    """The same bytes as a run that nobody stopped; the kill takes the coordinating process, and workers follow it."""
    spec = RunSpec.load(tiny, [f"run.rounds={ROUNDS}"])
    whole = run(spec)
    process = simulate(tiny, tmp_path, "--set", f"run.rounds={ROUNDS}", "--workers", "2")
    metrics = tmp_path / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while (not metrics.exists() or len(metrics.read_text().splitlines()) < 3) and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    children = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, number) if number == signal.SIGKILL else os.killpg(process.pid, number)
    process.communicate(timeout=300)
    assert process.returncode == code
    assert len(children) >= 2
    assert psutil.wait_procs(children, timeout=60)[1] == []
    resumed = run(spec, tmp_path, workers=2)
    assert len(resumed.metrics) == ROUNDS + 1
    assert resumed.outcome.adapter.tobytes() == whole.outcome.adapter.tobytes()
