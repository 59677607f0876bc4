"""The site's policy: what it refuses, what it lets pass, and that nothing is computed from data where it objects."""

import logging
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedapt.client.accounts import Accounts
from fedapt.client.client import Client
from fedapt.client.evaluation import Scores
from fedapt.client.policy import LEAST_CLIP, MOST_EPSILON, MOST_NOISE, UNTOLD, Policy
from fedapt.privacy.accounting import spent
from fedapt.privacy.events import Event, Everyone, GaussianEvent, Poisson
from fedapt.privacy.example_level import example_level_of
from fedapt.privacy.ledger import SiteLedger
from fedapt.promise import promise
from fedapt.protocols.codecs import uplink_of
from fedapt.protocols.errors import DataError, PrivacyError, RunError, SpecError
from fedapt.protocols.recipes import RECIPES
from fedapt.protocols.records import EVALUATE, TRAIN, assignment_to_records, update_from_records
from fedapt.protocols.spec import RunSpec
from fedapt.protocols.update import Assignment, Update
from fedapt.server.admission import refusal
from fedapt.server.coordinator import Coordinator
from fedapt.server.store import MemoryStore
from fedapt.sim.grid import LocalGrid

from .clients import asked, assignments_of, client_of, sites_of, spec_of, state_of
from .ledgers import broken

EXAMPLE = Path(__file__).parents[2] / "examples" / "client.toml"
DIGEST, OTHER = "a" * 64, "b" * 64
PRIVATE = (
    "recipe.name=ffa",
    "recipe.weighting=uniform",
    "privacy.unit=example",
    "privacy.epsilon=100",
    "privacy.noise_multiplier=1.5",
    "privacy.clip=0.5",
    "local.steps=2",
    "run.rounds=3",
    "run.evaluate_every=3",
)
# All of the node's four examples are in each batch, and ε is in closed form: these tests need no accountant's second.
FULL, NODE = {50: 4}, 50


def policy_of(**clauses: Any) -> Policy:
    return Policy.read({"policy": clauses})


def private(*overrides: str, sizes: dict[int, int] = FULL) -> Client:
    return client_of(*PRIVATE, *overrides, sizes=sizes)


def ask(client: Client, round_: int = 1, run: str = "run", node: int = NODE) -> Assignment:
    (assignment,) = assignments_of(client, [node], state_of(client), round_)
    return replace(assignment, run=run)


def train(client: Client, round_: int = 1, run: str = "run") -> Update:
    (update,) = client.train([ask(client, round_, run)])
    return update


CLAUSES: list[tuple[dict[str, Any], list[str], list[str], str]] = [
    ({"units": ["example"]}, ["privacy.unit=none"], [], 'privacy.unit = "example"'),
    ({"units": ["client", "example"]}, ["privacy.noise=simulation"], [], 'privacy.noise = "secret"'),
    ({"recipes": ["fedsvd", "ffa"]}, ["recipe.name=fedit"], [], 'recipe.name = "fedsvd"'),
    ({"public": ["open"]}, ["adapter.public=closed"], ["adapter.public=open"], 'public = ["open"]'),
    ({"units": ["example"]}, ["adapter.public=open"], [], "public = []"),
    ({"most_steps": 5}, ["local.steps=6"], ["local.steps=5"], "local.steps = 5 or less"),
    ({"most_batch": 4}, ["local.batch_size=5"], ["local.batch_size=4"], "local.batch_size = 4 or less"),
    ({"most_length": 16}, ["model.max_length=17"], ["model.max_length=16"], "model.max_length = 16 or less"),
    ({"most_rounds": 3}, ["run.rounds=4"], ["run.rounds=3"], "run.rounds = 3 or less"),
    ({}, ["local.steps=100001"], ["local.steps=100000"], "local.steps = 100000 or less"),
    ({}, ["local.batch_size=16385"], ["local.batch_size=16384"], "most_batch = 16384"),
    ({"least_noise": 1.5}, ["privacy.noise_multiplier=1.4999"], ["privacy.noise_multiplier=1.5"], "= 1.5 or more"),
    ({"most_clip": 0.5}, ["privacy.clip=0.5001"], ["privacy.clip=0.5"], "privacy.clip = 0.5 or less"),
    (
        {"most_epsilon": 9.0, "delta": 1e-6},
        ["privacy.delta=2e-6"],
        ["privacy.delta=1e-6"],
        "privacy.delta = 1e-06 or less",
    ),
    ({"least_noise": 0.1}, ["privacy.unit=none"], [], 'allows the units "example"; least_noise = 0.1'),
    ({"most_clip": 9.0}, ["privacy.unit=client"], [], "most_clip = 9"),
    ({"most_epsilon": 9.0}, ["privacy.noise=simulation"], [], "whoever knows the seed"),
    ({"most_epsilon_per_run": 9.0}, ["privacy.unit=none"], [], "most_epsilon_per_run = 9"),
]


def asking(*overrides: str) -> RunSpec:
    if "privacy.unit=none" in overrides:
        return spec_of("recipe.name=ffa", "local.steps=2")
    return spec_of(*PRIVATE, *overrides)


@pytest.mark.parametrize(("clauses", "wrong", "right", "way_out"), CLAUSES)
def test_each_clause_refuses_and_the_nearest_legal_spec_passes(
    clauses: dict[str, Any], wrong: list[str], right: list[str], way_out: str
) -> None:
    policy = policy_of(**clauses)
    (problem,) = policy.problems(asking(*wrong), DIGEST)
    assert way_out in problem
    assert "Way out: " in problem
    assert wrong[0].split("=")[0] in problem
    assert policy.problems(asking(*right), DIGEST) == []


def test_another_base_is_refused() -> None:
    spec = asking()
    (problem,) = policy_of(base=OTHER).problems(spec, DIGEST)
    assert DIGEST in problem
    assert OTHER in problem
    assert policy_of(base=DIGEST).problems(spec, DIGEST) == []
    assert policy_of(base=OTHER).problems(spec, None) == []  # before a model is loaded


def test_steps_that_follow_from_the_data_cannot_be_bounded() -> None:
    spec = client_of("local.epochs=1").spec
    (problem,) = policy_of(most_steps=7).problems(spec, None)
    assert "Way out: local.steps = 7 or less" in problem
    assert not any(character in problem.replace("most_steps = 7", "") for character in "012345689")


def test_passes_over_the_data_are_bounded_where_steps_are_not() -> None:
    policy = policy_of(most_epochs=2.0)
    (problem,) = policy.problems(client_of("local.epochs=2.5").spec, None)
    assert "local.epochs = 2.5 is above the site's most_epochs = 2." in problem
    for right in ("local.epochs=2", "local.steps=1000"):
        assert policy.problems(client_of(right).spec, None) == []
    assert policy_of().problems(client_of("local.epochs=1e9").spec, None) != []


def test_all_problems_are_named_at_once() -> None:
    policy = policy_of(least_noise=2.0, most_clip=0.1, most_steps=1, recipes=["fedsvd"], base=OTHER, most_epsilon=1.0)
    assert len(policy.problems(asking("privacy.delta=1e-4"), DIGEST)) == 6


def test_numbers_that_are_none_are_refused() -> None:
    """No spec that was checked holds one."""
    spec, nan = asking(), float("nan")
    policy = policy_of(least_noise=1.0, most_clip=1.0, most_epsilon=1.0)
    privacy = spec.privacy.model_copy(update={"noise_multiplier": nan, "clip": nan, "delta": nan})
    assert len(policy.problems(spec.model_copy(update={"privacy": privacy}), None)) == 3


@settings(max_examples=60)
@given(st.sampled_from(list(RECIPES)), st.sampled_from(["none", "example", "client"]), st.booleans())
def test_a_policy_without_clauses_objects_to_nothing(recipe: str, unit: str, seeded: bool) -> None:
    privacy = [f"privacy.unit={unit}", "privacy.epsilon=2", f"privacy.noise={'simulation' if seeded else 'secret'}"]
    spec = spec_of(f"recipe.name={recipe}", "adapter.public=x", *(privacy if unit != "none" else []))
    assert Policy().problems(spec, DIGEST) == []
    assert Policy().caps(spec.privacy)[1] == float("inf")


# A policy is refused when it is read.


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("units = []", r"\[policy\] units = \[\]: no run can meet it"),
        ('units = ["client"]\nleast_noise = 1', r"units = \['client'\], with least_noise = 1"),
        ('units = ["exmple"]', r"policy.units = 'exmple': .*did you mean \"example\""),
        ('units = "example"', "policy.units = 'example'"),
        ("recipes = []", r"recipes = \[\]: none of them"),
        ('recipes = ["fedsvt"]', 'did you mean "fedsvd"'),
        ('recipes = ["flora"]\nmost_clip = 1.0', "Way out: one of fedsvd, ffa, refresh, fedit"),
        ('recipes = ["flora"]\nunits = ["example", "client"]', "none of them can give the units"),
        ("most_clip = 0", "policy.most_clip = 0.*: input should be greater than 0"),
        ("most_clip = -1.0", "greater than 0"),
        ("most_clip = nan", "policy.most_clip = nan"),
        ("most_clip = inf", "finite"),
        (f"most_clip = {LEAST_CLIP / 2!r}", "no run can meet it. Way out: 7.8"),
        ("least_noise = nan", "policy.least_noise = nan"),
        (f"least_noise = {MOST_NOISE * 1.01}", "less than or equal to 250000"),
        ("most_epsilon = 1.01e6", "policy.most_epsilon = .*less than or equal to 1000000"),
        ("most_epsilon_per_run = 1e300", "policy.most_epsilon_per_run = 1e.300.*less than or equal to 1000000"),
        ("most_length = 1", "policy.most_length = 1.*greater than or equal to 2"),
        ("least_noise = -0.0", "greater than 0"),
        ("least_noise = true", "policy.least_noise = True: input should be a valid number"),
        ('least_noise = "1"', "valid number"),
        ("most_epsilon = -3", "policy.most_epsilon = -3"),
        ("most_epsilon = 1e999", "finite"),
        ("most_epsilon_per_run = 0.0", "greater than 0"),
        ("most_steps = 0", "policy.most_steps = 0"),
        ("most_steps = 2.5", "policy.most_steps = 2.5"),
        ("most_batch = 0", "policy.most_batch = 0"),
        ("most_length = true", "policy.most_length = True"),
        ("most_epochs = inf", "policy.most_epochs = inf"),
        ("hub = 1", "policy.hub"),
        ('hub = "gpt2"', "policy.hub"),
        ("most_epsilon = 1\ndelta = 1", "policy.delta = 1"),
        ("most_epsilon = 1\ndelta = nan", "policy.delta = nan"),
        ("most_epsilon = 1\ndelta = 1e-13", "policy.delta = 1e-13"),
        ("delta = 1e-6", "delta = 1e-06 has no meaning without a cap"),
        ('base = "abc"', "policy.base = 'abc'"),
        (f'base = "{"A" * 64}"', "policy.base"),
        ("least_nose = 1", 'policy.least_nose = 1: unknown key; did you mean "least_noise"'),
        ("[policy.units]\na = 1", "policy.units"),
        ("least_noise = 1\nleast_noise = 2", "not TOML"),
        ("units = " + "[" * 20_000, "not TOML"),
    ],
)
def test_a_policy_that_cannot_be_meant_is_refused_when_it_is_read(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "client.toml"
    path.write_text("[policy]\n" + text, encoding="utf-8")
    with pytest.raises(SpecError, match=message) as caught:
        Policy.load(path)
    assert str(caught.value).startswith(str(path))


def test_what_is_within_the_bounds_of_a_policy_some_run_can_meet() -> None:
    policy = policy_of(
        least_noise=MOST_NOISE, most_epsilon=MOST_EPSILON, most_epsilon_per_run=MOST_EPSILON, most_length=2
    )
    spec = asking(f"privacy.noise_multiplier={MOST_NOISE}", "privacy.clip=1", "model.max_length=2")
    assert policy.problems(spec, None) == []
    assert example_level_of(spec, 4, 1, 6).noise_std >= MOST_NOISE
    with pytest.raises(PrivacyError, match="drowns"):  # the control: no run could keep to twice as much
        _ = example_level_of(spec.set(f"privacy.noise_multiplier={2 * MOST_NOISE}"), 4, 1, 6).noise_std


def test_an_exchange_is_one_step_and_keeps_to_any_limit_on_steps() -> None:
    """Its spec can state no steps, so a policy that asks for them, and allows codes alone, could be met by no run."""
    policy = policy_of(recipes=["dpzo"], most_steps=1, most_epochs=0.1)
    assert policy.problems(spec_of("recipe.name=dpzo"), None) == []
    assert policy.problems(spec_of("recipe.name=ffa", "local.steps=2"), None) != []


def test_a_file_without_a_policy_does_not_allow_everything(tmp_path: Path) -> None:
    path = tmp_path / "client.toml"
    for content, message in (
        (b"", "tables there are none"),
        (b"[polcy]\nunits = []", r"\[polcy\]"),
        (b"policy = 3", "policy = 3"),
        (b"\xff", "cannot be read"),
    ):
        path.write_bytes(content)
        with pytest.raises(SpecError, match=message):
            Policy.load(path)
    for missing in (tmp_path, tmp_path / "no.toml"):
        with pytest.raises(SpecError, match=str(missing)):
            Policy.load(missing)
    path.write_text("[policy]\n[data]\nsource = 'own.jsonl'")
    assert Policy.load(path) == Policy()


def test_what_is_hardly_meant_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "client.toml"
    for text, message in (
        ("most_epsilon_per_run = 3", "run after run"),
        ("most_epsilon_per_run = 3\nmost_epsilon = 2", "most_epsilon = 2 is smaller"),
        ("most_epsilon_per_run = 2\nmost_epsilon = 2", ""),
        ("most_epsilon = 2", ""),
    ):
        caplog.clear()
        path.write_text("[policy]\n" + text)
        with caplog.at_level(logging.WARNING):
            Policy.load(path)
        assert len(caplog.messages) == bool(message)
        assert message in caplog.text


def test_the_example_is_the_policy_of_a_hospital() -> None:
    policy = Policy.load(EXAMPLE)
    assert policy.warnings() == []
    assert policy.problems(asking("privacy.epsilon=3", "privacy.delta=1e-6"), None) == []
    assert policy.problems(spec_of(), None) != []


# What a client does that obeys it.


def test_a_policy_without_clauses_changes_no_byte() -> None:
    for client in (client_of(), private("privacy.noise=simulation")):
        nodes = client.nodes()
        plain = client.train(assignments_of(client, nodes, state_of(client)))
        obeying = client.keeping(Accounts()).obeying(Policy())
        assert obeying.train(assignments_of(client, nodes, state_of(client))) == plain
        assert {update.kind for update in plain} == {"delta"}


def no_data(*_: object, **__: object) -> Any:
    raise AssertionError("data was looked at")


@pytest.mark.parametrize(
    ("client", "clauses", "reason"),
    [
        (client_of(), {"units": ["example"]}, 'privacy.unit = "none" is refused'),
        (client_of(), {"base": OTHER}, OTHER),
        (client_of(), {"recipes": ["ffa"]}, 'recipe.name = "fedit" is refused'),
        (private(), {"least_noise": 2.0}, "least_noise = 2"),
        (private(), {"most_clip": 0.25}, "most_clip = 0.25"),
        (private("privacy.noise=simulation"), {"most_epsilon": 5.0}, "privacy.noise"),
    ],
)
def test_where_it_objects_nothing_is_computed_from_data(client: Client, clauses: dict[str, Any], reason: str) -> None:
    nodes = sorted(client.sites.indices)  # one of them has no example
    assignments = [replace(one, payload=b"rubbish") for one in assignments_of(client, nodes, state_of(client))]
    obeying = client.obeying(policy_of(**clauses))
    with patch.multiple(Client, _started=no_data, _own=no_data), patch.object(Accounts, "charge", no_data):
        updates = obeying.train(assignments)
        answer = update_from_records(asked(obeying, TRAIN, nodes[0], assignment_to_records(assignments[0])))
        with pytest.raises(PrivacyError):
            obeying.evaluate(nodes[0])
        with pytest.raises(AssertionError, match="data was looked at"):  # the control
            client.train(assignments)
    assert answer == updates[0]
    for assignment, update in zip(assignments, updates, strict=True):
        assert (update.kind, update.payload, update.weight, update.metrics) == ("refused", b"", 0.0, {})
        assert (update.run, update.round, update.node) == (assignment.run, assignment.round, assignment.node)
        assert reason in update.reason
        said = refusal(update, assignment, uplink_of(client.spec), client.shared.sent(1))
        assert said == f"the node refuses: {update.reason}"


def test_the_pinned_base_is_that_of_the_model() -> None:
    client = client_of(sizes=FULL)
    assert train(client.obeying(policy_of(base=client.adapted.base_digest()))).kind == "delta"
    assert train(client.obeying(policy_of(base=OTHER))).kind == "refused"


def test_a_policy_outlives_the_spec_and_its_accounts_too() -> None:
    client = private().obeying(policy_of(most_epsilon=100.0, most_steps=2))
    assert client.objections == []
    assert train(client).kind == "delta"
    other = client.under(client.spec.set("local.steps=3"))
    assert "most_steps = 2" in train(other).reason
    assert client.under(client.spec.set("local.steps=1")).accounts is client.accounts
    assert private().accounts is not private().under(client.spec).accounts
    assert client.at(sites_of({7: 2})).policy is client.policy


def test_a_task_cannot_name_other_data() -> None:
    """A node trains on what is held here; `data.source` is for simulations, and read by nobody."""
    client = client_of(sizes=FULL)
    elsewhere = client.under(client.spec.set("data.source=/etc/passwd")).obeying(Policy())
    assert train(elsewhere).payload == train(client).payload
    with pytest.raises(DataError, match="node 51"):
        elsewhere.train([replace(ask(client), node=51)])


def test_noise_that_is_solved_for_is_held_to_the_same() -> None:
    client = client_of(*(one for one in PRIVATE if "noise_multiplier" not in one), sizes=FULL)
    assert client.spec.privacy.noise_multiplier is None
    found = []
    with patch.object(Policy, "require_noise", lambda _, z: found.append(z)):
        assert train(client).kind == "delta"
    (solved,) = found
    assert train(client.obeying(policy_of(least_noise=solved))).kind == "delta"
    with patch.object(Accounts, "charge", no_data):
        update = train(client.obeying(policy_of(least_noise=solved * 1.001)))
    assert update.kind == "refused"
    assert f"below the site's least_noise = {solved * 1.001:g}" in update.reason


@pytest.mark.parametrize("clauses", [{"units": ["example"]}, {"units": ["client"]}, {"least_noise": 1.0}])
def test_exact_scores_do_not_leave_where_nothing_leaves_without_noise(clauses: dict[str, Any]) -> None:
    client = private("privacy.unit=client") if clauses.get("units") == ["client"] else private()
    obeying = client.obeying(policy_of(**clauses))
    assert obeying.objections == []
    records = assignment_to_records(ask(client))
    with patch("fedapt.client.client.score", no_data), pytest.raises(PrivacyError, match="exact scores"):
        asked(obeying, EVALUATE, NODE, records)
    assert isinstance(client_of("recipe.name=ffa").obeying(Policy()).evaluate(NODE), Scores)


# The caps on ε.


@pytest.mark.parametrize("folder", [True, False])
def test_the_round_before_the_cap_is_trained_and_the_next_refused(folder: bool, tmp_path: Path) -> None:
    """Two runs of three rounds: what they may spend together ends in the middle of the second."""
    client = private().keeping(Accounts(tmp_path if folder else None))
    event = GaussianEvent(
        unit="example", relation="add-remove", noise_std=1.5, sensitivity=1.0, secret=True, sampling=Everyone(), count=2
    )
    price = [spent([event] * count, 1e-5).epsilon for count in range(8)]
    client = client.obeying(policy_of(most_epsilon=(price[4] + price[5]) / 2))
    assert [train(client, round_, "one").kind for round_ in (1, 2, 3)] == ["delta"] * 3
    second = [train(client, round_, "two") for round_ in (1, 2, 3)]
    assert [update.kind for update in second] == ["delta", "refused", "refused"]
    assert "over all runs" in second[1].reason
    assert client.accounts.ledger(NODE, "two").spent(1e-5).epsilon == pytest.approx(price[1], rel=1e-6)
    assert train(client.obeying(Policy()), 2, "two").kind == "delta"  # the control: the run's own cap has room
    if folder:
        rows = SiteLedger(tmp_path / f"{NODE}.sqlite").chain().entries
        assert [(row.run, row.round) for row in rows] == [("one", 1), ("one", 2), ("one", 3), ("two", 1), ("two", 2)]


@pytest.mark.parametrize(("asks", "allows"), [(100.0, 4.5), (4.5, 100.0)])
def test_the_smaller_cap_of_a_run_wins(asks: float, allows: float) -> None:
    def rounds(asks: float, allows: float, run: str) -> list[str]:
        policy = policy_of(most_epsilon_per_run=allows, most_epsilon=1000.0)
        client = private(f"privacy.epsilon={asks}").obeying(policy)
        return [train(client, round_, run).kind for round_ in (1, 2, 3)]

    assert rounds(asks, allows, "one") == ["delta", "refused", "refused"]
    assert rounds(100.0, 100.0, "one") == ["delta"] * 3


def test_a_round_that_passes_a_cap_is_not_computed() -> None:
    client = private().obeying(policy_of(most_epsilon=0.5))
    with patch("fedapt.client.private.PrivateTrainer._alone", no_data):
        assert train(client).kind == "refused"
        with pytest.raises(AssertionError, match="data was looked at"):  # the control
            train(private())


EVENTS = [
    GaussianEvent(
        unit=unit, relation="add-remove", noise_std=z, sensitivity=1.0, secret=True, sampling=sampling, count=count
    )
    for unit in ("example", "client")
    for z, sampling, count in ((1.0, Everyone(), 1), (3.0, Poisson(1.0), 2), (2.0, Everyone(), 0))
]
CAPS = st.sampled_from([1.0, 4.0, 6.0, 9.0, float("inf")])
CHARGES = st.tuples(st.sampled_from([7, 8]), st.sampled_from("ab"), st.sampled_from(EVENTS), CAPS, CAPS)
Charge = tuple[int, str, Event, float, float]
"""Node, run, event, and the caps on ε: of the run, and over all."""


def outcome(accounts: Accounts, charge: Charge) -> tuple[str, float]:
    """Why the charge is refused, and what the node has then spent in the run."""
    node, run, event, per_run, in_all = charge
    assignment = Assignment(run, 1, 1, node, "", b"")
    try:
        accounts.charge(assignment, event, 1e-5, per_run=per_run, in_all=in_all)
    except PrivacyError as error:
        return str(error), accounts.spent(assignment, 1e-5).epsilon
    return "", accounts.spent(assignment, 1e-5).epsilon


@settings(max_examples=25, deadline=None)
@given(st.lists(CHARGES, max_size=8))
def test_accounts_in_memory_are_those_in_files(charges: list[Charge]) -> None:
    with TemporaryDirectory() as folder:
        memory, files = Accounts(), Accounts(Path(folder))
        for charge in charges:
            assert outcome(memory, charge) == outcome(files, charge)
        for file in files._files.values():
            file.close()


@pytest.mark.parametrize("folder", [True, False])
def test_caps_are_of_a_node_over_its_runs(folder: bool, tmp_path: Path) -> None:
    accounts, event = Accounts(tmp_path if folder else None), EVENTS[0]
    one, two = (spent([event] * count, 1e-5).epsilon for count in (1, 2))
    assert outcome(accounts, (7, "a", event, one, two))[0] == ""
    assert "caps: " in outcome(accounts, (7, "a", event, one, two))[0]
    assert outcome(accounts, (7, "b", event, one, two))[0] == ""
    assert outcome(accounts, (8, "c", event, one, two))[0] == ""
    refused, left = outcome(accounts, (7, "c", event, one, two))
    assert f"{two:g} over all runs" in refused
    assert left == 0.0


# What the server sees.


def refused(client: Client, caplog: pytest.LogCaptureFixture, run: str = "run") -> tuple[str, str]:
    """What the server is told of a refusal, and what the site's log says."""
    caplog.clear()
    with caplog.at_level(logging.WARNING, "fedapt.client.policy"):
        update = train(client, run=run)
    assert update.kind == "refused"
    (logged,) = caplog.messages
    return update.reason, logged


def test_a_refusal_tells_nothing_of_other_runs(caplog: pytest.LogCaptureFixture) -> None:
    """Two sites, of which one has spent more on runs of others, refuse in the same words; their logs have the numbers."""
    found = []
    for before in (1, 2):
        client = private().keeping(Accounts())
        for round_ in range(before):
            assert train(client, round_ + 1, "other").kind == "delta"
        found.append(refused(client.obeying(policy_of(most_epsilon=0.5)), caplog))
    (told, one), (again, two) = found
    assert told == again
    assert "above 0.5 at delta = 1e-05: the site's most_epsilon, over all runs" in told
    assert one != two
    assert "would bring epsilon from" in one


def test_a_refusal_names_the_cap_of_the_run(caplog: pytest.LogCaptureFixture) -> None:
    told, _ = refused(private().obeying(policy_of(most_epsilon_per_run=0.5, most_epsilon=99.0)), caplog)
    assert "above 0.5 at delta = 1e-05: the run's cap" in told
    assert "most_epsilon_per_run" in told
    assert "99" not in told


def test_a_refusal_tells_nothing_of_how_much_is_held(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Noise that is solved for depends on the number of examples."""
    monkeypatch.setattr(
        "fedapt.privacy.example_level._solved", lambda _epsilon, _delta, sampling, _steps: sampling.rate
    )
    solved = [one for one in PRIVATE if "noise_multiplier" not in one]
    policy = policy_of(least_noise=50.0)
    found = [refused(client_of(*solved, sizes={NODE: size}).obeying(policy), caplog) for size in (12, 40)]
    assert found[0][0] == found[1][0]
    assert "least_noise = 50" in found[0][0]
    assert found[0][1] != found[1][1]


def test_a_refusal_tells_nothing_of_a_broken_ledger(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert train(private().keeping(Accounts(tmp_path))).kind == "delta"
    broken(tmp_path / f"{NODE}.sqlite")
    told, logged = refused(private().keeping(Accounts(tmp_path)), caplog)
    assert told == UNTOLD
    assert f"{tmp_path / str(NODE)}.sqlite: the ledger's row 2" in logged


def test_a_run_ends_where_every_sites_cap_is_spent() -> None:
    client = private("run.rounds=6", sizes={50: 4, 60: 4}).obeying(policy_of(most_epsilon=7.0))
    coordinator = Coordinator(client.spec, LocalGrid(client), MemoryStore())
    rows = list(coordinator.rounds())
    assert 0 < len(rows) < 6
    assert coordinator.ending == "every site's cap on epsilon is spent: the run ends here"
    kept = promise(client.spec, coordinator.store.rows("run"), coordinator.ledger)
    assert (kept.unit, kept.epsilon) == ("example", 100.0)
    assert np.array_equal(coordinator.adapter(), coordinator.adapter(len(rows)))


def test_the_servers_log_names_the_reason(caplog: pytest.LogCaptureFixture) -> None:
    client = client_of().obeying(policy_of(units=["example"]))
    store = MemoryStore()
    coordinator = Coordinator(client.spec, LocalGrid(client), store)
    with caplog.at_level(logging.WARNING), pytest.raises(RunError, match=r"the node refuses: privacy\.unit"):
        next(coordinator.rounds())
    reasons = dict(store.refusals("run", 1))
    assert sorted(reasons) == client.nodes()
    assert all('Way out: privacy.unit = "example"' in reason for reason in reasons.values())
    logged = [message for message in caplog.messages if "refused an update of node" in message]
    assert len(logged) == len(reasons)
    assert all("the node refuses: privacy.unit" in message for message in logged)
