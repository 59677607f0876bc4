"""The resident worker alone: what it answers, what it never tells, and how its process rests and locks."""

import asyncio
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import pytest

from fedapt.client.duties import Duties
from fedapt.client.kept import Kept
from fedapt.client.policy import RefusalError
from fedapt.client.resident import Resident, read_spec
from fedapt.client.site import Site
from fedapt.client.status import Status, alone_in, is_paused, is_served, pause, read_status, resume
from fedapt.privacy.accounting import spent
from fedapt.protocols import link
from fedapt.protocols import link_pb2 as pb
from fedapt.protocols.codecs import CODECS
from fedapt.protocols.errors import FedaptError, OutputError, PayloadError, PrivacyError, RunError, SpecError
from fedapt.protocols.exchange import Answer, Exchange, terms_of
from fedapt.protocols.outbox import Outbox
from fedapt.protocols.spec import RunSpec
from fedapt.protocols.update import Assignment
from fedapt.server.export import save_adapter

from .ledgers import FULL
from .residents import make_site, spec_of

SITE = 7


def resident_of(tmp_path: Path, extra: str = "", policy: str = "") -> Resident:
    folder = make_site(tmp_path / "site", "north", 1, extra, policy)
    return Resident(Site.load(folder), SITE, folder, save=save_adapter, status=Status(folder))


def asked_for(kind: pb.Kind, spec: RunSpec, payload: bytes = b"", round_: int = 1) -> tuple[pb.Question, bytes, bytes]:
    raw = spec.to_json().encode()
    asked = Assignment(spec.run.name, round_, 1, SITE, "0" * 64, payload)
    return link.question(kind, asked, link.blob(raw), link.blob(payload)), raw, payload


def first_payload(resident: Resident, spec: RunSpec, rank: int = 2) -> bytes:
    _, described = resident.work(*asked_for(pb.DESCRIBE, spec))
    from fedapt.protocols.legality import recipe_of
    from fedapt.protocols.shared import SharedAdapter

    found = link.description_from_bytes(described)
    shared = SharedAdapter(recipe_of(spec), spec.recipe, found.layout, found.start)
    own = shared.delivered(1, rank)
    return CODECS["fp32"].encode(shared.received(1).cut(shared.initial_state(), own), own, 0)


def test_one_model_serves_the_runs_that_need_it(tmp_path: Path) -> None:
    resident, spec = resident_of(tmp_path), spec_of()
    payload = first_payload(resident, spec)
    loaded = resident._loaded
    result, update = resident.work(*asked_for(pb.TRAIN, spec, payload))
    assert (result.kind, result.weight) == ("delta", 4)
    assert resident._loaded is loaded
    assert loaded is not None
    other = spec_of("run.name=other", "local.steps=1")
    _, shorter = resident.work(*asked_for(pb.TRAIN, other, payload))
    assert resident._loaded is not None
    assert resident._loaded.client.adapted is loaded.client.adapted
    assert shorter != update
    resident.work(*asked_for(pb.DESCRIBE, spec_of("adapter.rank=3")))
    assert resident._loaded.client.adapted is not loaded.client.adapted


def test_the_same_question_gives_the_same_bytes(tmp_path: Path) -> None:
    resident, spec = resident_of(tmp_path, extra="micro_batch = 1"), spec_of()
    payload = first_payload(resident, spec)
    assert resident.work(*asked_for(pb.TRAIN, spec, payload)) == resident.work(*asked_for(pb.TRAIN, spec, payload))


@pytest.mark.slow
def test_private_rounds_are_charged_before_they_train_and_again(tmp_path: Path) -> None:
    """What was cut off is charged once more: never too little."""
    resident = resident_of(tmp_path, policy='units = ["example"]\nmost_epsilon = 4.0')
    spec = spec_of("privacy.unit=example", "privacy.epsilon=3.0", "recipe.name=ffa", "recipe.weighting=uniform")
    payload = first_payload(resident, spec)
    charges = []
    for _ in range(2):
        result, _ = resident.work(*asked_for(pb.TRAIN, spec, payload))
        assert (result.kind, result.weight) == ("delta", 1)
        charges.append(resident.accounts._file(SITE).ledger().spent(1e-5).epsilon)
    assert 0 < charges[0] < charges[1] < 4.0
    assert not resident.halfway.path.exists()
    with pytest.raises(PrivacyError, match="only"):
        resident.work(*asked_for(pb.EVALUATE, spec, payload))


def test_a_site_has_one_cap_whatever_its_id(tmp_path: Path) -> None:
    """New keys in the same folder are another node, and the same data."""
    first, cap = resident_of(tmp_path), spent([FULL], 1e-5).epsilon * 1.01
    charge = partial(Assignment, round=1, attempt=1, version="", payload=b"")
    first.accounts.charge(charge(run="a", node=SITE), FULL, 1e-5, per_run=cap, in_all=cap)
    again = Resident(first.site, SITE + 1, first.folder, save=save_adapter, status=first.status)
    with pytest.raises(PrivacyError, match="over all runs"):
        again.accounts.charge(charge(run="b", node=SITE + 1), FULL, 1e-5, per_run=cap, in_all=cap)
    again.accounts.charge(charge(run="b", node=SITE + 1), FULL, 1e-5, per_run=cap, in_all=2 * cap)  # the control
    assert [path.name for path in (first.folder / "accounts").glob("*.sqlite")] == ["ledger.sqlite"]


def test_what_a_refusal_does_not_tell_stands_in_the_sites_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def charge(*_: object, **__: object) -> None:
        raise RefusalError("from 2.7 to 3.1", told="above 3")

    resident = resident_of(tmp_path)
    noise = ("privacy.unit=example", "privacy.epsilon=3", "privacy.noise_multiplier=2")
    spec = spec_of(*noise, "recipe.name=ffa", "recipe.weighting=uniform")
    payload = first_payload(resident, spec)
    monkeypatch.setattr("fedapt.client.accounts.Accounts.charge", charge)
    result, _ = resident.work(*asked_for(pb.TRAIN, spec, payload))
    assert (result.kind, result.reason) == ("refused", "above 3")
    (row,) = read_status(resident.folder)["rounds"]
    assert (row["kind"], row["reason"]) == ("refused", "from 2.7 to 3.1")


KEEPING = {
    "top-k": ["wire.codec=top-k", "wire.density=0.1"],
    "diloco": ["recipe.name=diloco", "recipe.fragments=2"],
}
"""What a node keeps of a round is used in the next."""


def rounds_of(resident: Resident, spec: RunSpec, numbers: Sequence[int]) -> Iterator[tuple[str, bytes]]:
    """Kind and payload of rounds in which the federation stays where it started."""
    for round_ in numbers:
        shared = resident._client(spec).client.shared
        own = shared.delivered(round_)
        payload = CODECS["fp32"].encode(shared.received(round_).cut(shared.initial_state(), own), own, 0)
        result, update = resident.work(*asked_for(pb.TRAIN, spec, payload, round_))
        yield result.kind, update


@pytest.mark.parametrize("keeping", KEEPING)
def test_runs_that_alternate_and_a_new_process_change_no_round(tmp_path: Path, keeping: str) -> None:
    """And none of the run is left once its adapter is adopted, while the other run's stays."""
    one, two = (spec_of("local.steps=1", *KEEPING[keeping], f"run.name={name}") for name in ("one", "two"))
    (tmp_path / "alone").mkdir()
    expected = list(rounds_of(resident_of(tmp_path / "alone"), one, [1, 2, 3]))
    found: list[tuple[str, bytes]] = []
    resident = resident_of(tmp_path)
    for number in (1, 2, 3):
        found += rounds_of(resident, one, [number])
        assert next(rounds_of(resident, two, [number]))[0] == "delta"
        resident = resident_of(tmp_path)
    assert found == expected
    assert [kind for kind, _ in found] == ["delta"] * 3
    forgetful = list(rounds_of(resident, one.set("run.name=three"), [3]))
    assert forgetful != expected[2:], "the control: what was kept matters"

    shared = resident._client(one).client.shared
    whole = CODECS["fp32"].encode(shared.initial_state(), shared.received(4), 0)
    resident.work(*asked_for(pb.ADOPT, one, whole, 4))
    assert {run for run, _, _ in resident.shelf[SITE]} - {"three"} == {"two"}


def test_refusals(tmp_path: Path) -> None:
    """A policy's refusal is an update; it needs neither model nor data."""
    resident = resident_of(tmp_path, policy='recipes = ["fedsvd"]')
    (resident.folder / "own.jsonl").unlink()
    result, payload = resident.work(*asked_for(pb.TRAIN, spec_of(), b"x"))
    assert (result.kind, result.weight, payload) == ("refused", 0, b"")
    assert "fedsvd" in result.reason
    for kind in (pb.DESCRIBE, pb.EVALUATE, pb.ADOPT):
        with pytest.raises(PrivacyError, match="fedsvd"):
            resident.work(*asked_for(kind, spec_of(), b"x"))
    assert resident._loaded is None


def test_nothing_is_downloaded_that_the_site_has_not_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object) -> None:
        raise AssertionError("a download was begun")

    monkeypatch.setattr("fedapt.client.resident.load", load)
    resident, spec = resident_of(tmp_path), spec_of("model.base=gpt2")
    result, _ = resident.work(*asked_for(pb.TRAIN, spec, b"x"))
    assert (result.kind, 'hub = ["gpt2"]' in result.reason) == ("refused", True)
    with pytest.raises(PrivacyError, match="would be downloaded"):
        resident.work(*asked_for(pb.DESCRIBE, spec))
    with pytest.raises(RunError, match="AssertionError"):  # the control
        resident.work(*asked_for(pb.DESCRIBE, spec_of()))


def test_a_round_beyond_the_runs_last_is_refused(tmp_path: Path) -> None:
    resident = resident_of(tmp_path, policy="most_rounds = 3")
    result, _ = resident.work(*asked_for(pb.TRAIN, spec_of(), b"x", round_=4))
    assert (result.kind, result.reason) == ("refused", "round 4 of a run of 3")


def test_a_rank_that_is_too_large_is_refused(tmp_path: Path) -> None:
    """The server is told what this site can afford; one that asks for more all the same gets no update."""
    resident, spec = resident_of(tmp_path, extra="most_rank = 1"), spec_of("recipe.name=flexlora")
    payloads = {rank: first_payload(resident, spec, rank) for rank in (1, 2)}
    kinds = {}
    for rank, payload in payloads.items():
        asked = Assignment(spec.run.name, 1, 1, SITE, "0" * 64, payload, rank)
        raw = spec.to_json().encode()
        question = link.question(pb.TRAIN, asked, link.blob(raw), link.blob(payload))
        result, answer = resident.work(question, raw, payload)
        kinds[rank] = result.kind, result.reason, bool(answer)
    assert kinds[1] == ("delta", "", True)
    assert kinds[2] == ("refused", "asked to train at rank 2, and this node can afford 1 (most_rank)", False)
    assert Site.load(resident.folder).train.most_rank == 1


@pytest.mark.parametrize("most", ["0", "-1", "65537", "1.5"])
def test_a_rank_that_means_nothing_is_no_setting(tmp_path: Path, most: str) -> None:
    with pytest.raises(SpecError, match="most_rank"):
        resident_of(tmp_path, extra=f"most_rank = {most}")


def test_what_is_wrong_with_the_data_stays_here(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    resident = resident_of(tmp_path)
    (resident.folder / "own.jsonl").write_text('{"text": "fine"}\n{"text": 17}\n{"diagnosis": "secret"}\n')
    with pytest.raises(RunError) as told:
        resident.work(*asked_for(pb.DESCRIBE, spec_of()))
    assert "DataError at this site" in str(told.value)
    assert "own.jsonl" not in str(told.value)
    assert "own.jsonl" in caplog.text


@pytest.mark.parametrize("fault", [KeyError("patient 17"), OutputError("/srv/patients17/accounts: the disk is full")])
def test_a_fault_stays_here_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Exception) -> None:
    resident = resident_of(tmp_path)

    def fail(*_: object) -> None:
        raise fault

    monkeypatch.setattr(resident, "_describe", fail)
    with pytest.raises(RunError) as told:
        resident.work(*asked_for(pb.DESCRIBE, spec_of()))
    assert f"{type(fault).__name__} at this site" in str(told.value)
    assert "17" not in str(told.value)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"data": {"source": "/etc/passwd"}}, PayloadError),
        ({"recipe": {"name": "nonsense"}}, SpecError),
        ({"modle": {}}, SpecError),
        ({"run": {"name": "other"}}, SpecError),
        ({"run": {"name": "../../up"}}, SpecError),
    ],
)
def test_specs_are_checked(change: Mapping[str, object], error: type[FedaptError]) -> None:
    raw = json.loads(spec_of().to_json())
    assert read_spec(json.dumps(raw).encode(), "resident") == spec_of()
    with pytest.raises(error):
        read_spec(json.dumps(raw | change).encode(), "resident")


@pytest.mark.parametrize("raw", [b"", b"[]", b"\xff", b"[" * 100_000, b"1e999"])
def test_what_is_no_spec_is_refused(raw: bytes) -> None:
    with pytest.raises(PayloadError):
        read_spec(raw, "resident")


@pytest.mark.parametrize("override", ["model.base=/etc", "adapter.start=/tmp", "adapter.public=/etc/passwd"])
def test_a_server_cannot_name_files_here(tmp_path: Path, override: str) -> None:
    extra = ["recipe.initial_a=eva"] if "public" in override else []
    with pytest.raises(SpecError, match="machine"):
        resident_of(tmp_path).work(*asked_for(pb.DESCRIBE, spec_of(override, *extra)))


def test_an_exchange_is_always_answered(tmp_path: Path) -> None:
    resident = resident_of(tmp_path)
    answer = Answer.from_bytes(SITE, resident.exchange((5).to_bytes(4, "little") + b"rest"), 16)
    assert (answer.number, answer.kind) == (5, "refused")
    asked = Exchange("elsewhere", SITE, 5, 0, 0, 0.01)
    answer = Answer.from_bytes(SITE, resident.exchange(asked.to_bytes()), 16)
    assert (answer.number, answer.kind) == (5, "lost"), "it has not heard of the run"


def test_exchanges_of_a_run_begin_with_its_spec(tmp_path: Path) -> None:
    spec = spec_of("recipe.name=onebyte", "recipe.weighting=uniform", "zeroth.directions=4")
    spec = spec.model_copy(update={"local": spec.local.model_copy(update={"steps": None})})
    resident, scale = resident_of(tmp_path), terms_of(spec).code.scale_of(1.0)
    first = Exchange(spec.run.name, SITE, 1, 0, scale, 0.01)
    question = pb.Question(id=b"q" * 16, kind=pb.EXCHANGE, run=spec.run.name, round=1)
    result, body = resident.work(question, spec.to_json().encode(), first.to_bytes())
    answer = Answer.from_bytes(SITE, body, 4)
    assert (result.kind, answer.number, answer.kind) == ("", 1, "codes")
    assert resident.exchange(first.to_bytes()) == body, "the same exchange is answered with the same codes"


def test_a_resting_node_begins_nothing(tmp_path: Path) -> None:
    """It says so in its beats, and goes on when it may."""
    begun: list[str] = []

    class Counting:
        def work(self, question: pb.Question, spec: bytes, payload: bytes) -> tuple[pb.Result, bytes]:
            begun.append(question.run)
            return pb.Result(question=question.id, payload=link.blob(b"")), b""

        def exchange(self, body: bytes) -> bytes:
            return body

    async def run() -> None:
        reasons = ["paused"]
        closed: list[bytes] = []
        duties = Duties(
            Counting(),
            Kept(tmp_path / "kept"),
            resting=lambda: reasons[0],
            closed=lambda received: closed.append(received.question),
        )
        working = asyncio.ensure_future(duties.run())
        duties.enter(Outbox(lambda chunk: chunk.SerializeToString()))
        question, _, _ = asked_for(pb.TRAIN, spec_of())
        duties.question(question)
        await asyncio.sleep(0.1)
        assert duties.standing == "paused"
        assert begun == []
        reasons[0] = ""
        async with asyncio.timeout(10):
            while not begun or duties._open:
                await asyncio.sleep(0.01)
        assert duties.standing == "idle"
        duties.received(pb.Received(question=question.id))
        assert closed == [question.id]
        working.cancel()
        await asyncio.gather(working, return_exceptions=True)

    asyncio.run(run())


def test_pause_lock_and_status(tmp_path: Path) -> None:
    assert not is_paused(tmp_path)
    pause(tmp_path)
    assert is_paused(tmp_path)
    assert resume(tmp_path)
    assert not resume(tmp_path)
    assert not is_served(tmp_path)
    assert read_status(tmp_path) == {}
    with alone_in(tmp_path):
        assert is_served(tmp_path)
        with pytest.raises(RunError, match="another process"), alone_in(tmp_path):
            pass
    assert not is_served(tmp_path)
    status = Status(tmp_path)
    for number in range(12):
        status.round(run="r", round=number, kind="delta")
    status.connected(True, "")
    found = read_status(tmp_path)
    assert [row["round"] for row in found["rounds"]] == list(range(2, 12))
    assert found["connected"]
    (tmp_path / "status.new").mkdir()  # as a disk that is full
    status.doing("goes on")
    assert read_status(tmp_path) == found
