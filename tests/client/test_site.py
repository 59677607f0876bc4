"""client.toml: what is read, what is refused and how; bases, labels and hours of a site."""

from datetime import datetime
from pathlib import Path

import pytest

from fedapt.client.loading import folder_digest, on_device, own_tables, require_folder
from fedapt.client.models import load_model
from fedapt.client.site import Base, OwnData, Schedule, Site, Train, import_base
from fedapt.protocols.errors import DataError, ModelError, SpecError
from fedapt.protocols.spec import Model, RunSpec

from .residents import spec_of

WHOLE = """
[server]
address = "fl.example.org:7443"
[data]
source = "own.jsonl"
[policy]
"""


def site_of(tmp_path: Path, text: str = WHOLE) -> Site:
    (tmp_path / "client.toml").write_text(text, encoding="utf-8")
    return Site.load(tmp_path)


def test_paths_are_taken_from_the_files_folder(tmp_path: Path) -> None:
    (tmp_path / "own.jsonl").touch()
    site = site_of(tmp_path)
    assert site.server.keys == tmp_path / "keys"
    assert site.require_data().source == str(tmp_path / "own.jsonl")


def test_what_join_writes_can_be_read(tmp_path: Path) -> None:
    from fedapt.client.enrolment import CONFIG

    site = site_of(tmp_path, CONFIG.format(server='[server]\naddress = "fl.example.org:7443"\nkeys = "keys"\n'))
    with pytest.raises(DataError, match="source"):
        site.require_data()


def test_the_example_can_be_read() -> None:
    site = Site.load(Path(__file__).parents[2] / "examples")
    assert site.policy.units == ("example",)
    assert site.require_data().labels == ("negative", "positive")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("[data]", "[data]\nsorce = 1"), 'data.sorce = 1: unknown key; did you mean "source"'),
        (("[policy]", "[train]\ndevise = 1\n[policy]"), 'did you mean "device"'),
        (("[policy]", '[train]\nquantize = "nf5"\n[policy]'), 'did you mean "nf4"'),
        (("[policy]", '[schedule]\nhours = "20-6"\n[policy]'), "20:00-06:00"),
        (("[policy]", '[schedule]\nhours = "20:00-20:00"\n[policy]'), "all hours"),
        ((":7443", ""), "host:port"),
        (("[data]", 'plaintext = "a"\n[data]'), "join it with a token"),
        (("[policy]", ""), r"\[policy\] is missing"),
        (("[server]", "[servre]"), 'did you mean "server"'),
    ],
)
def test_mistakes_are_named(tmp_path: Path, change: tuple[str, str], said: str) -> None:
    with pytest.raises(SpecError, match=said):
        site_of(tmp_path, WHOLE.replace(*change))


@pytest.mark.parametrize(
    ("hours", "inside", "outside"),
    [
        (None, ["00:00", "12:00"], []),
        ("20:00-06:00", ["20:00", "23:59", "00:00", "05:59"], ["06:00", "12:00", "19:59"]),
        ("09:00-17:00", ["09:00", "16:59"], ["08:59", "17:00", "23:00"]),
    ],
)
def test_hours(hours: str | None, inside: list[str], outside: list[str]) -> None:
    schedule = Schedule(hours=hours)
    for clock in inside + outside:
        assert schedule.allows(datetime.fromisoformat(f"2026-01-01T{clock}")) == (clock in inside)


def test_an_imported_base_is_the_one_that_was_looked_at(tmp_path: Path) -> None:
    folder = tmp_path / "models" / "base"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / ".cache").write_text("not counted")
    digest = folder_digest(folder)
    site_of(tmp_path)
    import_base(tmp_path, "org/base", folder, digest)
    site = Site.load(tmp_path)
    assert site.local(spec_of("model.base=org/base")).model.base == str(folder)
    base = site.base_of("org/base")
    assert base is not None
    require_folder(base)
    with pytest.raises(SpecError, match="already"):
        import_base(tmp_path, "org/base", folder, digest)
    import_base(tmp_path, "org/other", folder, digest)
    (folder / ".cache").write_text("still not counted")
    require_folder(base)
    (folder / "config.json").write_text("{ }")
    with pytest.raises(ModelError, match="import it again"):
        require_folder(base)
    with pytest.raises(ModelError, match="no folder"):
        require_folder(Base(folder=tmp_path / "nowhere", sha256=digest))


def test_a_servers_folder_needs_one_here(tmp_path: Path) -> None:
    site = site_of(tmp_path)
    for base in ("builtin:byte-llama", "FacebookAI/roberta-base", "gpt2"):
        assert site.local(spec_of(f"model.base={base}")).model.base == base
    for base in ("/models/base", "../base", ".", "~/base", str(tmp_path)):
        with pytest.raises(SpecError, match="another machine"):
            site.local(spec_of(f"model.base={base}"))


@pytest.mark.parametrize(
    ("policy", "allowed"),
    [
        ("", []),
        ("hub = true", ["org/base", "gpt2"]),
        ('hub = ["org/base"]', ["org/base"]),
        (f'hub = true\nbase = "{64 * "a"}"', []),
    ],
)
def test_what_is_downloaded_is_what_the_site_names(tmp_path: Path, policy: str, allowed: list[str]) -> None:
    """A pinned base is not: what its hash is, the download would tell."""
    site = site_of(tmp_path, WHOLE + policy)
    for base in ("org/base", "gpt2"):
        problems = site.problems(spec_of(f"model.base={base}"))
        assert (problems == []) == (base in allowed)
        assert all("fedapt client import" in problem for problem in problems)
    assert site.problems(spec_of()) == [], "what comes with the program is here"
    (tmp_path / "model").mkdir()
    import_base(tmp_path, "org/base", tmp_path / "model", 64 * "b")
    assert Site.load(tmp_path).problems(spec_of("model.base=org/base")) == []


def test_public_data_is_downloaded_where_the_site_names_it(tmp_path: Path) -> None:
    spec = spec_of("recipe.initial_a=eva", "adapter.public=org/texts")
    (problem,) = site_of(tmp_path).problems(spec)
    assert 'adapter.public = "org/texts" would be downloaded' in problem
    for allowed in ('public = ["org/texts"]', "hub = true", 'hub = ["org/texts"]'):
        assert site_of(tmp_path, WHOLE + allowed).problems(spec) == []


def test_precision_is_the_sites_where_it_says_so(tmp_path: Path) -> None:
    site = site_of(tmp_path, WHOLE + '[train]\nprecision = "bf16"\n')
    assert site.local(spec_of()).model.precision == "bf16"
    assert site_of(tmp_path).local(spec_of()).model.precision == "fp32"


CLASSES = Model(base="b", task="sequence-classification", labels=2)


def rows(tmp_path: Path, *labels: str) -> str:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f'{{"text": "a", "label": {label}}}\n' for label in labels))
    return str(path)


def test_words_for_labels_need_the_order_of_all_sites(tmp_path: Path) -> None:
    """A site that has but one of two classes would call it class 0 by itself."""
    source = rows(tmp_path, '"positive"')
    with pytest.raises(DataError, match=r"data\.labels"):
        own_tables(OwnData(source=source), CLASSES)
    table, _ = own_tables(OwnData(source=source, labels=("negative", "positive")), CLASSES)
    assert table["label"][:] == [1]
    with pytest.raises(DataError, match="names 1 classes"):
        own_tables(OwnData(source=source, labels=("positive",)), CLASSES)
    with pytest.raises(DataError, match="legal range"):
        own_tables(OwnData(source=rows(tmp_path, "0", "2")), CLASSES)


def test_a_machine_that_lacks_what_the_file_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    spec: RunSpec = spec_of()
    with pytest.raises(ModelError, match="needs a CUDA GPU"):
        load_model(spec, "nf4")
    with pytest.raises(ModelError, match='device = "auto"'):
        on_device(load_model(spec), Train(device="cuda"))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("fedapt.client.models.find_spec", lambda _: None)
    with pytest.raises(ModelError, match="needs bitsandbytes"):
        load_model(spec, "int8")
