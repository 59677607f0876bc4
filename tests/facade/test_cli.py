"""The command line as a person types it: real processes, exit codes, one clear message for each mistake."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from .running import in_process

FEDAPT = [str(Path(sys.executable).with_name("fedapt"))]
COMMANDS = [
    [],
    ["demo"],
    ["init"],
    ["plan"],
    ["simulate"],
    ["sweep"],
    ["recipes"],
    ["doctor"],
    ["adapter"],
    ["adapter", "show"],
    ["adapter", "export"],
    ["adapter", "merge"],
    ["runs"],
    ["runs", "compare"],
    ["runs", "list"],
    ["runs", "show"],
    ["runs", "stop"],
    ["runs", "resume"],
    ["runs", "replay"],
    ["server"],
    ["server", "init"],
    ["server", "start"],
    ["server", "status"],
    ["token"],
    ["token", "create"],
    ["token", "list"],
    ["token", "revoke"],
    ["node"],
    ["node", "list"],
    ["node", "revoke"],
    ["client"],
    ["client", "join"],
    ["client", "start"],
    ["client", "status"],
    ["client", "pause"],
    ["client", "resume"],
    ["client", "import"],
    ["audit"],
    ["ledger"],
    ["ledger", "show"],
    ["ledger", "verify"],
]


def fedapt(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [*FEDAPT, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=cwd, check=False)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: " ".join(c) or "fedapt")
def test_help_has_an_example(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = in_process(capsys, *command, "--help")
    assert code == 0
    groups: tuple[list[str], ...] = ([], ["adapter"], ["runs"], ["ledger"], ["server"], ["token"], ["node"], ["client"])
    assert command in groups or "Example:" in out


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['fedapt', '--help']\n"
        "from fedapt.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'flwr', 'grpc', 'sqlalchemy', 'transformers', 'datasets', 'numpy'} & set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


FIRST_STEP = """
import sys
from fedapt.cli import main
from fedapt.client.trainer import Trainer
heavy = {"torch", "flwr", "grpc", "datasets", "pandas", "pyarrow", "aiohttp", "sklearn"}
Trainer.train = lambda *_, **__: sys.exit(f"loaded {sorted(heavy & set(sys.modules))}")
main()
"""


def test_a_simulation_waits_for_torch_and_nothing_that_it_does_not_need(tiny: Path, tmp_path: Path) -> None:
    """Each of the others takes a good part of a second: they would be there before the first step."""
    command = [sys.executable, "-P", "-c", FIRST_STEP, "simulate", str(tiny), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.stderr.splitlines()[-1] == "loaded ['torch']", done.stderr


def test_simulate_then_look_then_export(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = fedapt("simulate", tiny, "--out", out, "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["complete"]
    assert document["rounds"] == 2
    for name in ("report.html", "metrics.jsonl", "spec.toml", "adapter/adapter_model.safetensors"):
        assert (out / name).is_file()
    shown = fedapt("adapter", "show", out / "adapter")
    assert shown.returncode == 0
    assert "q_proj" in shown.stdout
    exported = fedapt("adapter", "export", out / "adapter", tmp_path / "merged")
    assert exported.returncode == 0, exported.stderr
    assert (tmp_path / "merged" / "model.safetensors").is_file()


@pytest.mark.slow
def test_without_a_terminal_one_line_a_round(tiny: Path, tmp_path: Path) -> None:
    done = fedapt("simulate", tiny, "--out", tmp_path / "out", "--baselines")
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"^tiny round \d/2 train loss .* moved ", done.stderr, re.MULTILINE)) == 2
    assert "centralized" in done.stdout
    assert "local only" in done.stdout
    assert "centralized" in (tmp_path / "out" / "report.html").read_text()


def test_init_and_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fedapt("init", "spec.toml", cwd=tmp_path).returncode == 0
    planned = fedapt("plan", "spec.toml", "--json", cwd=tmp_path)
    assert planned.returncode == 0, planned.stderr
    assert json.loads(planned.stdout)["recipe"] == "fedsvd"
    code, _, errors = in_process(capsys, "init", tmp_path / "spec.toml")
    assert code == 2
    assert "exists already" in errors


def test_a_sweep_is_one_table_and_is_not_run_twice(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = ("sweep", tiny, "--grid", "adapter.rank=1,2", "--out", tmp_path / "sweep", "--set", "run.rounds=1")
    code, out, _ = in_process(capsys, *grid)
    assert code == 0
    assert "adapter.rank=2" in out
    seconds = [_seconds(path) for path in sorted((tmp_path / "sweep").glob("*/metrics.jsonl"))]
    assert len(seconds) == 2
    code, out, _ = in_process(capsys, *grid, "--json")
    assert code == 0
    assert len(json.loads(out)["points"]) == 2
    assert seconds == [_seconds(path) for path in sorted((tmp_path / "sweep").glob("*/metrics.jsonl"))]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["run.rouds=3"], 'did you mean "rounds"?'),
        (["run.rounds=many"], "run.rounds = 'many'"),
        (["run.rounds=0"], "greater than or equal to 1"),
        (["recipe.name=fedsdv"], 'did you mean "fedsvd"?'),
        (["recipe.optimizer=adam"], 'Nearest legal: "novograd"'),
        (["privacy.unit=client"], "epsilon is missing"),
        (["data.source=missing.jsonl"], "missing.jsonl"),
        (["model.base=./nowhere"], "no such folder"),
        (["model.base=org/model"], "name its folder here"),
        (["data.partition.clients=9999"], "9999"),
        (["adapter.targets=['nothing']"], "adapter.targets"),
        (["adapter.rank=500"], "500"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_wrong_spec_is_one_clear_message(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], settings: list[str], message: str
) -> None:
    flags = [part for setting in settings for part in ("--set", setting)]
    code, _, errors = in_process(capsys, "simulate", tiny, "--out", tmp_path / "out", *flags)
    assert code == 2
    assert message in errors
    assert not list((tmp_path / "out").glob("*.part"))


def data_spec(source: Path, *, classify: bool = False) -> list[str]:
    settings = [f"data.source='{source}'", "data.partition.clients=2"]
    settings += ["model.task=sequence-classification", "model.labels=2"] if classify else []
    return [part for setting in settings for part in ("--set", setting)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty"),
        ('{"text": "a", "label": 0}\n{"text": \n', "line 2"),
        ('{"text": "a", "label": 0}\n{"text": "b", "label": 7}\n{"text": "c", "label": 1}\n', "7"),
        ('{"text": "a", "label": 0}\n{"text": "", "label": 1}\n', "row 2"),
        ('{"words": "a", "label": 0}\n{"words": "b", "label": 1}\n', "data.text"),
    ],
    ids=["empty", "malformed", "label", "blank", "column"],
)
def test_wrong_data_is_one_clear_message(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    source = tmp_path / "data.jsonl"
    source.write_text(text)
    code, _, errors = in_process(capsys, "simulate", tiny, "--out", tmp_path / "out", *data_spec(source, classify=True))
    assert code == 2
    assert message in errors


@pytest.mark.parametrize("arguments", [["adapter", "show", "nowhere"], ["plan", "nowhere.toml"], ["recipes", "fedsdv"]])
def test_wrong_arguments_exit_with_2(arguments: list[str]) -> None:
    done = fedapt(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("fedapt: ")
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_ctrl_c_saves_what_is_done_and_the_same_command_goes_on(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [*FEDAPT, "simulate", str(tiny), "--out", str(out), "--set", "run.rounds=400"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ))
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and _rounds(out) < 3:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 130, stderr
    assert "interrupted" in stdout
    assert "Traceback" not in stderr
    done = _rounds(out)
    assert done >= 3
    assert (out / "adapter" / "adapter_model.safetensors").is_file()
    assert (out / "report.html").is_file()
    rest = fedapt("simulate", tiny, "--out", out, "--set", f"run.rounds={done + 1}", "--json")
    assert rest.returncode == 0, rest.stderr
    assert json.loads(rest.stdout)["rounds"] >= done


def _rounds(out: Path) -> int:
    path = out / "metrics.jsonl"
    return max(0, len(path.read_text().splitlines()) - 1) if path.exists() else 0


def _seconds(path: Path) -> float:
    """How long round 1 took: a figure that no second run would repeat."""
    return float(json.loads(path.read_text().splitlines()[1])["seconds"])
