import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedapt.protocols.errors import SpecError
from fedapt.protocols.spec import Local, RunSpec

LEAST = '[model]\nbase = "m"\ntask = "causal-lm"\n'
FULL = """
[run]
name = "sst2-fedsvd"
rounds = 30
seed = 7
evaluate_every = 5
patience = 3

[model]
base = "FacebookAI/roberta-base"
task = "sequence-classification"
labels = 2
max_length = 64
precision = "bf16"

[adapter]
method = "lora"
rank = 8
alpha = 16
targets = ["query", "value"]
dropout = 0.1

[recipe]
name = "fedsvd"
period = 2
budget = 16
fragments = 3
mixing = 0.5
delay = 2
aggregator = "clip"
byzantine = 0.1
weighting = "uniform"
initial_a = "orthonormal"
optimizer = "nesterov"
learning_rate = 0.7
momentum = 0.9

[local]
optimizer = "adamw"
learning_rate = 2e-3
weight_decay = 0.01
batch_size = 32
steps = 10

[participation]
sampling = "fixed"
rate = 0.5
minimum = 2
deadline_seconds = 600
spare = 0.25
evaluates = true

[fleet]
examples_per_second = 4
uplink_mbps = 5

[privacy]
unit = "client"
epsilon = 6.0
delta = 1e-6
clip = 0.5
clipping = "adaptive"
mechanism = "banded"
separation = 4
noise_multiplier = 1.5
population = 1000
noise = "simulation"

[wire]
codec = "int8"
downlink = "bf16"
density = 0.05
coefficients = 100
values = "bf16"

[zeroth]
directions = 8
radius = 1e-2
code = "log8"
[data]
source = "train.jsonl"
evaluation = "test.jsonl"
limit = 5000
text = "sentence"
label = "gold"

[data.partition]
kind = "dirichlet"
clients = 100
alpha = 0.5
"""


def mistake(text: str, *overrides: str) -> str:
    """The one line that a wrong spec gets."""
    with pytest.raises(SpecError) as caught:
        RunSpec.parse(text, overrides=overrides)
    line = str(caught.value)
    assert "\n" not in line
    return line


def test_a_full_spec_is_read_whole() -> None:
    spec = RunSpec.parse(FULL)
    assert spec.adapter.targets == ("query", "value")
    assert spec.local.learning_rate == 2e-3
    assert spec.local.epochs is None
    assert spec.data is not None
    assert spec.data.partition.clients == 100


def test_a_full_spec_sets_every_section_but_the_other_choices() -> None:
    """FULL must grow with the spec, or it stops being full."""
    spec = RunSpec.parse(FULL)
    assert spec.model_fields_set == set(RunSpec.model_fields)
    for name in ("run", "recipe", "participation", "privacy", "wire", "model"):
        section = getattr(spec, name)
        of_another_task = {"template", "verbalizers"} if name == "model" else set()
        assert section.model_fields_set == set(type(section).model_fields) - of_another_task, name


def test_the_least_spec_is_complete() -> None:
    spec = RunSpec.parse(LEAST)
    assert spec.recipe.name == "fedsvd"
    assert spec.data is None


SECTION_MISTAKES = [
    ('[participation]\nsampling = "poisson"\nspare = 0.5', 'spare = 0.5 is illegal with sampling = "poisson"'),
    ("[run]\nround = 3", 'run.round = 3: unknown key; did you mean "rounds"?'),
    ("[adapter]\nzzz = 1", "adapter.zzz = 1: unknown key; the keys here are method, rank, ranks, alpha, "),
    ("[locl]\nsteps = 1", """locl = {'steps': 1}: unknown key; did you mean "local"?"""),
    ('[data]\nsource = "x"\n[data.partition]\nclient = 3', 'data.partition.client = 3: unknown key; did you mean "cli'),
    ("[run]\nrounds = 0", "run.rounds = 0: input should be greater than or equal to 1"),
    ("[run]\nrounds = 1.5", "run.rounds = 1.5: input should be a valid integer"),
    ('[run]\nrounds = "many"', "run.rounds = 'many': input should be a valid integer"),
    ("[run]\nseed = -1", "run.seed = -1: input should be greater than or equal to 0"),
    ('[run]\nname = "../up"', "run.name = '../up': string should match pattern"),
    ("[adapter]\nalpha = 0", "adapter.alpha = 0: input should be greater than 0"),
    ("[adapter]\ndropout = 1.0", "adapter.dropout = 1.0: input should be less than 1"),
    ("[adapter]\nrank = 8\nranks = [2, 4]", "[adapter] rank = 8 is not the largest of ranks = [2, 4]: set rank = 4"),
    ("[adapter]\nranks = [0, 8]", "adapter.ranks = 0: input should be greater than or equal to 1"),
    ('[adapter]\nmethod = "dora"\ndropout = 0.1', 'dropout = 0.1 is illegal with method = "dora"'),
    ("[adapter]\nlayers = [-1]", "adapter.layers = -1: input should be greater than or equal to 0"),
    ("[adapter]\nlayers = [3, 1, 1]", "[adapter] layers = [3, 1, 1] is not ascending. Nearest legal: layers = [1, 3]"),
    *(
        (
            f'[adapter]\nmethod = "{method}"\nlayers = [0]',
            f'layers = [0] is illegal with method = "{method}", which adapts no single blocks. Nearest legal: layers',
        )
        for method in ("prompt", "prefix", "head", "full")
    ),
    ("[recipe]\nbudget = 0", "recipe.budget = 0: input should be greater than or equal to 1"),
    ("[recipe]\nperiod = 0", "recipe.period = 0: input should be greater than or equal to 1"),
    ("[recipe]\nbyzantine = 0.5", "recipe.byzantine = 0.5: input should be less than 0.5"),
    ('[recipe]\naggregator = "meadian"', """(did you mean "median"?)"""),
    ("[wire]\ndensity = 0", "wire.density = 0: input should be greater than 0"),
    ('[adapter]\nmethod = "loar"', """'head' or 'full' (did you mean "lora"?)"""),
    ('[adapter]\ntargets = "all-linar"', "adapter.targets = 'all-linar': input should be 'all-linear' (did you mean"),
    ('[adapter]\ntargets = ["q", 5]', "adapter.targets = 5: input should be a valid string"),
    ("[adapter]\ntargets = 5", "adapter.targets = 5: input should be a valid"),
    ("[local]\nlearning_rate = inf", "local.learning_rate = inf: input should be a finite number"),
    ('[local]\noptimizer = "adam"', """'sgd' or 'adamw' (did you mean "adamw"?)"""),
    ("[participation]\nrate = nan", "participation.rate = nan: input should be"),
    ("[participation]\nrate = 1.1", "participation.rate = 1.1: input should be less than or equal to 1"),
    ('[participation]\nsampling = "poison"', """(did you mean "poisson"?)"""),
    (
        '[privacy]\nunit = "clients"',
        """privacy.unit = 'clients': input should be 'none', 'example' or 'client' (did yo""",
    ),
    (
        '[wire]\ncodec = "int4"',
        """input should be 'fp32', 'bf16', 'int8', 'fp4', 'top-k' or 'seed-projection' (did you mean "int8"?)""",
    ),
    ('[wire]\ndownlink = "int8"', "wire.downlink = 'int8': input should be 'fp32' or 'bf16'"),
    ("[data]\nlimit = 3", "data.source: missing; it must be set"),
    ("[local]\nsteps = 1\nepochs = 1", "[local] steps and epochs are both set: keep one of them"),
    ('[data]\nsource = "x"\nprompt = "p"', "[data] prompt and response go together: name both columns or neither"),
    ('[data]\nsource = "x"\n[data.partition]\nkind = "natural"', "[data.partition] column is missing: a "),
    ('[data]\nsource = "x"\n[data.partition]\nkind = "by-column"', 'a "by-column" partition needs the column'),
]


@pytest.mark.parametrize(
    ("text", "expected"), SECTION_MISTAKES, ids=[t.replace("\n", " ") for t, _ in SECTION_MISTAKES]
)
def test_one_mistake_gives_one_line(text: str, expected: str) -> None:
    line = mistake(LEAST + text)
    assert line.startswith("spec: ")
    assert expected in line


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "model: missing; it must be set"),
        ('[model]\nbase = "m"', "model.task: missing; it must be set"),
        ('[model]\nbase = "m"\ntask = "causal_lm"', """(did you mean "causal-lm"?)"""),
        ('[model]\nbase = "m"\ntask = "image-classification"', "[model] labels is missing: image-classification needs"),
        ('[model]\nbase = 5\ntask = "causal-lm"', "model.base = 5: input should be a valid string"),
        ("run = 5\n" + LEAST, "run = 5: input should be a valid dictionary"),
        ("data = 5\n" + LEAST, "data = 5: input should be a valid dictionary"),
        ("[model", "not TOML: "),
        (LEAST + LEAST, "not TOML: "),
    ],
)
def test_one_mistake_in_the_whole_gives_one_line(text: str, expected: str) -> None:
    assert expected in mistake(text)


def test_each_mistake_has_its_line() -> None:
    with pytest.raises(SpecError) as caught:
        RunSpec.parse(LEAST + "[run]\nrounds = 0\nsed = 1\n[wire]\ncodec = 'x'", where="spec.toml")
    lines = str(caught.value).splitlines()
    assert len(lines) == 3
    assert all(line.startswith("spec.toml: ") for line in lines)


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=5) | st.sampled_from(["base", "task", "targets", "partition"]), inner)
    ),
    max_leaves=5,
)


@given(anything, st.sampled_from(list(RunSpec.model_fields)))
def test_whatever_stands_in_a_section_only_spec_errors_come(value: object, section: str) -> None:
    raw = {"model": {"base": "m", "task": "causal-lm"}, section: value}
    try:
        RunSpec.check(raw)
    except SpecError as error:
        message = str(error)
    else:
        return
    assert section in message


def test_overrides_replace_and_add() -> None:
    spec = RunSpec.parse(
        FULL,
        overrides=[
            "run.rounds=5",
            "run.name = bare-word",
            'adapter.targets=["k"]',
            "local.learning_rate=1e-4",
            "data.partition.kind=iid",
            "adapter.start='a folder'",
            "model.base=org/name=x",
        ],
    )
    assert (spec.run.rounds, spec.run.name) == (5, "bare-word")
    assert spec.adapter.targets == ("k",)
    assert spec.adapter.start == "a folder"
    assert spec.local.learning_rate == 1e-4
    assert spec.model.base == "org/name=x"
    assert spec.data is not None
    assert (spec.data.partition.kind, spec.data.partition.clients) == ("iid", 100)


def test_an_override_makes_a_missing_section() -> None:
    spec = RunSpec.parse(LEAST, overrides=["data.source=builtin:stdlib", "data.partition.clients=3"])
    assert spec.data is not None
    assert spec.data.partition.clients == 3


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("run.rounds", "--set 'run.rounds': write it as section.key=value"),
        ("=5", "--set '=5': write it as section.key=value"),
        ("run..rounds=5", "write it as section.key=value"),
        ("model.base.x=1", "--set 'model.base.x=1': base is a value, not a section"),
        ("run.rounds=none", "run.rounds = 'none': input should be a valid integer"),
        ("run.rounds=", "run.rounds = '': input should be a valid integer"),
        ("run.rouns=5", 'did you mean "rounds"?'),
        ("rnu.rounds=5", 'did you mean "run"?'),
        ("run=5", "run = 5: input should be a valid dictionary"),
        ("local.epochs=1", "steps and epochs are both set"),
    ],
)
def test_a_bad_override_gives_one_line(override: str, expected: str) -> None:
    assert expected in mistake(FULL, override)


def test_set_gives_a_new_spec_and_leaves_the_old() -> None:
    spec = RunSpec.parse(FULL)
    changed = spec.set("run.rounds=2", "wire.codec=bf16")
    assert (changed.run.rounds, changed.wire.codec, spec.run.rounds) == (2, "bf16", 30)
    assert changed.set("run.rounds=30", "wire.codec=int8") == spec
    with pytest.raises(SpecError, match=re.escape("--set: run.rounds = 0: input should be greater")):
        spec.set("run.rounds=0")


def test_paths_that_exist_are_taken_from_the_folder_of_the_spec(tmp_path: Path) -> None:
    for name in ("train.jsonl", "warm", "base", "public.jsonl"):
        (tmp_path / name).touch()
    file = tmp_path / "spec.toml"
    file.write_text(FULL.replace("FacebookAI/roberta-base", "base"), encoding="utf-8")
    spec = RunSpec.load(file, overrides=["adapter.start=warm", "adapter.public=public.jsonl"])
    assert spec.data is not None
    assert spec.model.base == str(tmp_path / "base")
    assert spec.adapter.start == str(tmp_path / "warm")
    assert spec.adapter.public == str(tmp_path / "public.jsonl")
    assert spec.data.source == str(tmp_path / "train.jsonl")
    assert spec.data.evaluation == "test.jsonl", "what is no file here stays as it was written: a hub dataset, say"


def test_names_that_are_no_paths_stay(tmp_path: Path) -> None:
    (tmp_path / "builtin:stdlib").touch()
    spec = RunSpec.parse(LEAST + '[data]\nsource = "builtin:stdlib"', folder=tmp_path)
    assert spec.data is not None
    assert (spec.data.source, spec.model.base) == ("builtin:stdlib", "m")


def test_a_file_that_cannot_be_read_says_so(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"absent\.toml: no such file\. `fedapt init` writes"):
        RunSpec.load(tmp_path / "absent.toml")
    with pytest.raises(SpecError, match="cannot be read"):
        RunSpec.load(tmp_path)
    (tmp_path / "latin.toml").write_bytes(b'[run]\nname = "\xe9"')
    with pytest.raises(SpecError, match=r"latin\.toml: cannot be read"):
        RunSpec.load(tmp_path / "latin.toml")


@pytest.mark.parametrize("text", [LEAST, FULL])
def test_json_round_trip(text: str) -> None:
    spec = RunSpec.parse(text)
    again = RunSpec.check(json.loads(spec.to_json()))
    assert again == spec
    assert again.to_json() == spec.to_json()


def test_a_spec_cannot_be_changed_in_place() -> None:
    spec = RunSpec.parse(LEAST)
    with pytest.raises(ValueError, match="frozen"):
        spec.run.rounds = 3


def test_a_cosine_schedule_falls_from_the_rate_to_nothing() -> None:
    local = Local(learning_rate=2e-3, schedule="cosine")
    rates = [local.in_round(round_, 10).learning_rate for round_ in range(1, 11)]
    assert rates[0] == 2e-3
    assert rates == sorted(rates, reverse=True)
    assert 0 < rates[-1] < 1e-4
    assert Local(learning_rate=2e-3).in_round(7, 10).learning_rate == 2e-3
