"""Stock Flower across sites: what a site's ClientApp obeys, and (slow) a SuperLink with two SuperNodes over TLS."""

import ast
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from flwr.app import Context, Message, Metadata, RecordDict
from peft import PeftModel
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

from fedapt.client.accounts import Accounts, SiteAccounts
from fedapt.client.flower import app
from fedapt.client.loading import Loaded, load
from fedapt.client.models import base_folder
from fedapt.client.site import Site
from fedapt.client.status import pause
from fedapt.privacy.accounting import Account
from fedapt.protocols.codecs import CODECS
from fedapt.protocols.errors import FedaptError, PrivacyError, RunError, SpecError
from fedapt.protocols.legality import recipe_of
from fedapt.protocols.records import (
    DESCRIBE,
    TRAIN,
    assignment_to_records,
    description_from_records,
    message,
    update_from_records,
)
from fedapt.protocols.shared import SharedAdapter
from fedapt.protocols.spec import RunSpec
from fedapt.protocols.update import Assignment, Description, Update
from fedapt.server.coordinator import Coordinator
from fedapt.server.export import save_adapter
from fedapt.server.grid import Evaluated
from fedapt.server.store import MemoryStore

EXAMPLE = Path(__file__).parents[1] / "examples" / "flower-deployment"
SPEC = tomllib.loads((EXAMPLE / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["flwr"]["app"]["config"]["spec"]
LINES = {
    "north": ["def sail(boat): return boat.wind", "import anchor"],
    "south": ["assert cider", "class Orchard: pass"],
}
CHECKED = "with harbour: moor()"
NODE = 2**63 + 7
"""Flower's numbers of nodes do not fit into 63 bits."""


def make_site(folder: Path, name: str, policy: str = "", extra: str = "") -> Path:
    folder.mkdir()
    rows = [json.dumps({"text": line}) for line in LINES[name]]
    (folder / "own.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    (folder / "checked.jsonl").write_text(json.dumps({"text": CHECKED}) + "\n", encoding="utf-8")
    text = (
        '[server]\naddress = "127.0.0.1:8000"\n[data]\nsource = "own.jsonl"\nevaluation = "checked.jsonl"\n'
        f"[train]\nthreads = 1\n{extra}\n[policy]\n{policy}\n"
    )
    (folder / "client.toml").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture
def site(tmp_path: Path) -> Path:
    return make_site(tmp_path / "site", "north")


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def asked(
    kind: str, folder: Path | None, spec: str = SPEC, node: int = NODE, content: RecordDict | None = None
) -> Message:
    """What the site's app answers to a message."""
    metadata = Metadata(1, "", 1, node, "", "", time.time(), 3600.0, kind)
    config: dict[str, bool | float | int | str] = {} if folder is None else {"site": str(folder)}
    return app(message(content or RecordDict(), metadata), Context(1, node, config, RecordDict(), {"spec": spec}))


def trained(folder: Path, spec: str, node: int = NODE) -> Update:
    parsed = RunSpec.parse(spec)
    found = description_from_records(asked(DESCRIBE, folder, spec, node).content)
    shared = SharedAdapter(recipe_of(parsed), parsed.recipe, found.layout, found.start)
    payload = CODECS[parsed.wire.downlink].encode(shared.initial_state(), shared.delivered(1), 0)
    assignment = Assignment(parsed.run.name, 1, 1, node, "0" * 64, payload)
    return update_from_records(asked(TRAIN, folder, spec, node, assignment_to_records(assignment)).content)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda _: "/etc/passwd", "no file"),
        (lambda spec: f'{spec}\n[data]\nsource = "/etc/passwd"\n', "names its data itself"),
        (lambda spec: spec.replace('"fedsvd"', '"diloco"').replace('"int8"', '"fp32"'), "in memory between rounds"),
        (lambda spec: spec.replace('"fedsvd"', '"ffa"').replace('"int8"', '"top-k"'), "in memory between rounds"),
        (lambda spec: spec.replace('"builtin:byte-llama"', '"/etc"'), "another machine"),
    ],
)
def test_specs_that_are_not_for_sites(site: Path, change: Callable[[str], str], told: str) -> None:
    with pytest.raises(SpecError, match=told):
        asked(DESCRIBE, site, change(SPEC))


def test_a_node_must_name_its_site() -> None:
    with pytest.raises(SpecError, match="--node-config"):
        asked(DESCRIBE, None)


def test_the_policy_is_obeyed_before_anything_is_loaded(tmp_path: Path) -> None:
    folder = make_site(tmp_path / "site", "north", 'recipes = ["ffa"]')
    (folder / "own.jsonl").unlink()
    for kind in (DESCRIBE, TRAIN):
        with pytest.raises(PrivacyError, match="fedsvd"):
            asked(kind, folder)


def test_a_site_that_rests_begins_nothing(site: Path) -> None:
    pause(site)
    with pytest.raises(RunError, match="paused"):
        asked(DESCRIBE, site)


@pytest.mark.parametrize("file", ["own.jsonl", "client.toml"])
def test_what_is_wrong_at_a_site_stays_there(site: Path, file: str, caplog: pytest.LogCaptureFixture) -> None:
    (site / file).write_text('{"diagnosis": "secret"}\n', encoding="utf-8")
    caplog.set_level("ERROR", "flwr")
    with pytest.raises(FedaptError) as told:
        asked(DESCRIBE, site)
    assert str(told.value) == "DataError at this site, which its operator finds in its log"
    assert told.value.__cause__ is None
    assert told.value.__context__ is None


def test_where_a_base_lies_is_not_told(tmp_path: Path) -> None:
    """A base that the site has imported goes by the spec's name for it."""
    extra = f'[model.bases."somebody/base"]\nfolder = "{base_folder("builtin:byte-llama")}"'
    folder = make_site(tmp_path / "site", "north", extra=extra)
    described = asked(DESCRIBE, folder, SPEC.replace("builtin:byte-llama", "somebody/base"))
    config = description_from_records(described.content).config
    assert config["base_model_name_or_path"] == "somebody/base"


def test_one_ledger_whatever_the_node_is_called(tmp_path: Path) -> None:
    """A SuperNode that starts again is another node to Flower, and the same one to the site's cap."""
    folder = make_site(tmp_path / "site", "north", 'units = ["example"]\nmost_epsilon = 4.0')
    spec = SPEC.replace('"fedsvd"', '"ffa"\nweighting = "uniform"').replace("evaluates = true", "")
    spec += '[privacy]\nunit = "example"\nepsilon = 3.0\n'
    charges = []
    for node in (NODE, 5):
        assert trained(folder, spec, node).kind == "delta"
        assert [path.name for path in (folder / "accounts").iterdir() if path.suffix == ".sqlite"] == ["ledger.sqlite"]
        charges.append(spent(folder).epsilon)
    assert 0 < charges[0] < charges[1] < 4.0


def spent(folder: Path) -> Account:
    return SiteAccounts(folder / "accounts").ledger(99, "flower").spent(1e-5)


class Sites:
    """The same sites in one process, without Flower: a `server.grid.NodeGrid`."""

    def __init__(self, loaded: Mapping[int, Loaded]) -> None:
        self.loaded = loaded
        self.sent: Sequence[Assignment] = ()

    def nodes(self) -> list[int]:
        return sorted(self.loaded)

    def rank(self, node: int) -> int:
        return 0

    def describe(self) -> Description:
        return self.loaded[self.nodes()[0]].client.describe()

    def send(self, assignments: Sequence[Assignment]) -> None:
        self.sent = assignments

    def replies(self, timeout: float) -> Iterator[Update]:
        for assignment in self.sent:
            yield from self.loaded[assignment.node].client.train([assignment])

    def evaluate(self, assignments: Sequence[Assignment], timeout: float) -> Iterator[Evaluated]:
        for assignment in assignments:
            client = self.loaded[assignment.node].scoring()
            client.load(assignment)
            scores = client.evaluate(assignment.node)
            yield Evaluated(assignment.node, float(len(scores.loss)), scores.metrics(client.adapted.task))


class Deployment:
    """Commands in Flower's environment, and their logs. `close` ends all that has come of them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.home = folder, folder / "flwr"
        self.started: list[subprocess.Popen[bytes]] = []
        own = {"FLWR_HOME": str(self.home), "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        self.environment = {**os.environ, **own, "OMP_NUM_THREADS": "1", "PATH": path}

    def start(self, name: str, *command: object) -> None:
        with (self.folder / f"{name}.log").open("wb") as log:
            self.started.append(subprocess.Popen([*map(str, command)], stdout=log, stderr=log, env=self.environment))

    def run(self, *command: object) -> str:
        """What a command prints."""
        done = subprocess.run(
            [*map(str, command)], capture_output=True, text=True, timeout=540, env=self.environment, check=False
        )
        return done.stdout

    def node(self, name: str) -> int:
        """The number that Flower has given to a SuperNode; waits until it has."""
        log = self.folder / f"{name}.log"
        deadline = time.monotonic() + 120
        while not (found := re.search(r"SuperNode ID: (\d+)", log.read_text(encoding="utf-8"))):
            assert time.monotonic() < deadline, (log.read_text(), (self.folder / "superlink.log").read_text())
            time.sleep(0.2)
        return int(found[1])

    def close(self) -> None:
        """Processes that a process of Flower's has started know Flower's home as well, and that nobody else has."""
        while own := [process for process in psutil.process_iter() if self._is_own(process)]:
            for process in own:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(own, timeout=10)
        for process in self.started:
            process.wait()

    def _is_own(self, process: psutil.Process) -> bool:
        try:
            home: str | None = process.environ().get("FLWR_HOME")
        except psutil.Error:  # gone, a zombie, or somebody else's
            return False
        return home == str(self.home)


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """README's commands, the ports being free ones: a SuperLink with fedapt's certificates, and two sites."""
    folder = tmp_path_factory.mktemp("deployment")
    own, port = Deployment(folder), free_port()
    certificates = folder / "federation/certificates"
    own.run("fedapt", "server", "init", "--name", "127.0.0.1", "--folder", folder / "federation")
    own.home.mkdir()
    connection = f'address = "127.0.0.1:{port}"\nroot-certificates = "{certificates}/ca.pem"\n'
    (own.home / "config.toml").write_text(f"[superlink.federation]\n{connection}", encoding="utf-8")
    server = certificates / "server.pem"
    tls = ("--ssl-ca-certfile", certificates / "ca.pem", "--ssl-certfile", server, "--ssl-keyfile", server)
    alone = "--disable-runtime-dependency-installation"
    try:
        own.start("superlink", "flower-superlink", *tls, "--host", "127.0.0.1", "--port", port, alone)
        for name in LINES:
            site = f'site="{make_site(folder / name, name)}"'
            link = ("--superlink", f"127.0.0.1:{port}", "--root-certificates", certificates / "ca.pem")
            own.start(name, "flower-supernode", *link, "--port", free_port(), "--node-config", site)
        yield own
    finally:
        own.close()


def expected_run(deployment: Deployment) -> tuple[Coordinator, list[dict[str, Any]]]:
    """The same run, with the same numbers of nodes, without Flower."""
    spec, loaded = RunSpec.parse(SPEC), {}
    for name in LINES:
        node = deployment.node(name)
        loaded[node] = load(Site.load(deployment.folder / name), spec, node, Accounts())
    coordinator = Coordinator(spec, Sites(loaded), MemoryStore())
    return coordinator, list(coordinator.rounds())


@pytest.mark.slow
def test_two_sites_over_tls(deployment: Deployment, tmp_path: Path) -> None:
    coordinator, rows = expected_run(deployment)  # both nodes are there, once their numbers are
    folder, out = tmp_path / "app", tmp_path / "adapter"
    shutil.copytree(EXAMPLE, folder)
    log = deployment.run("flwr", "run", folder, "federation", "--stream", "--run-config", f'out="{out}"')
    found = [ast.literal_eval(row) for row in re.findall(r"fedapt round \d+: (\{.*\})", log)]
    assert len(found) == len(rows) == 2, log[-4000:]
    for row, expected in zip(found, rows, strict=True):
        assert row["nodes"] == 2
        assert row["train_loss"] == pytest.approx(expected["train_loss"], rel=1e-5)
    assert found[1]["federated"] == pytest.approx(rows[1]["federated"], rel=1e-5)
    assert found[1]["federated"]["examples"] == 2, "scores come from what each site has for that"

    save_adapter(tmp_path / "expected", coordinator.description, coordinator.adapter())
    tensors, others = (load_file(f / "adapter_model.safetensors") for f in (out, tmp_path / "expected"))
    assert set(tensors) == set(others)
    for name, tensor in tensors.items():
        np.testing.assert_allclose(tensor, others[name], rtol=0, atol=1e-6)
    base = AutoModelForCausalLM.from_pretrained(base_folder("builtin:byte-llama"), dtype="float32")
    model = PeftModel.from_pretrained(base, str(out))
    loaded = {name.replace(".default.", "."): p.detach().numpy() for name, p in model.named_parameters()}
    assert all(np.array_equal(loaded[name], tensor) for name, tensor in tensors.items())
    assert any(tensor.any() for name, tensor in tensors.items() if "lora_B" in name), "something was trained"


@pytest.mark.slow
def test_a_recipe_of_codes_is_refused_in_words(deployment: Deployment, tmp_path: Path) -> None:
    deployment.node("north")
    folder = tmp_path / "app"
    shutil.copytree(EXAMPLE, folder)
    text = SPEC.replace('"fedsvd"', '"onebyte"').replace('"int8"', '"fp32"').replace("steps = 2", "")
    text = text.replace("evaluates = true", "")
    project = folder / "pyproject.toml"
    project.write_text(project.read_text(encoding="utf-8").replace(SPEC, "\n" + text), encoding="utf-8")
    log = deployment.run("flwr", "run", folder, "federation", "--stream")
    assert 'SpecError: recipe.name = "onebyte"' in log, log[-4000:]
    assert "deploy it on our own link" in log
    (run, *_) = json.loads(deployment.run("flwr", "list", "federation", "--format", "json"))["runs"]
    assert run["status"] == "finished:failed"
    assert 'recipe.name = "onebyte"' in run["status-details"]
