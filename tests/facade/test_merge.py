"""`fedapt adapter merge`: the numbers against dense matrices, the folder against peft, one message for each mistake."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.numpy import load_file, save_file
from transformers import BertConfig, BertForSequenceClassification

from fedapt.adapters import describe_adapter, read_adapter
from fedapt.kernels.lowrank import Matrix
from fedapt.kernels.merging import breadcrumbs, pcb, ties
from fedapt.merging import merge_adapters
from fedapt.protocols.errors import ModelError, OutputError, SpecError

from .running import in_process

PREFIX = "base_model.model."
SHAPES = {"layer.0.query": (6, 5), "layer.1.query": (4, 7)}


def write(folder: Path, tensors: Mapping[str, Matrix], **settings: Any) -> Path:
    folder.mkdir(parents=True)
    save_file(
        {name: np.ascontiguousarray(values) for name, values in tensors.items()}, folder / "adapter_model.safetensors"
    )
    config = {"peft_type": "LORA", "base_model_name_or_path": "org/base", "r": 2, "lora_alpha": 4, **settings}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def tensors_of(seed: int, rank: int = 2) -> dict[str, Matrix]:
    random = np.random.default_rng(seed)
    tensors = {PREFIX + "classifier.bias": random.standard_normal(3).astype(np.float32)}
    for name, (out, inputs) in SHAPES.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = random.standard_normal((rank, inputs)).astype(np.float32)
        tensors[f"{PREFIX}{name}.lora_B.weight"] = random.standard_normal((out, rank)).astype(np.float32)
    return tensors


def change_of(folder: Path, module: str, scaling: float = 1.0) -> Matrix:
    tensors = load_file(folder / "adapter_model.safetensors")
    b, a = (tensors[f"{PREFIX}{module}.lora_{factor}.weight"].astype(np.float64) for factor in "BA")
    return np.asarray(scaling * b @ a)


@pytest.fixture
def pair(tmp_path: Path) -> list[Path]:
    """Two adapters of different rank, alpha and scaling rule; in the first, one module has a rank and alpha of its own."""
    first = tensors_of(1)
    first |= {name: values for name, values in tensors_of(3, rank=1).items() if "layer.1" in name}
    patterns = {"rank_pattern": {"1.query": 1}, "alpha_pattern": {r"layer\.1\.query": 5.0}}
    return [
        write(tmp_path / "a", first, **patterns),
        write(tmp_path / "b", tensors_of(2, rank=3), r=3, lora_alpha=6, use_rslora=True),
    ]


SCALINGS = {"layer.0.query": (4 / 2, 6 / 3**0.5), "layer.1.query": (5 / 1, 6 / 3**0.5)}


def test_the_mean_is_the_mean_of_the_products(pair: list[Path], tmp_path: Path) -> None:
    facts = merge_adapters(pair, tmp_path / "out", weights=[1, 3], rank=5)
    assert facts["error"] == 0
    assert facts["rank"] == 5
    for module, scalings in SCALINGS.items():
        changes = [change_of(folder, module, s) for folder, s in zip(pair, scalings, strict=True)]
        assert np.allclose(change_of(tmp_path / "out", module), 0.25 * changes[0] + 0.75 * changes[1], atol=1e-5)
    config, tensors = read_adapter(tmp_path / "out")
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (5, 5, False)
    assert not config["rank_pattern"]
    assert not config["alpha_pattern"]
    heads = [read_adapter(folder)[1][PREFIX + "classifier.bias"] for folder in pair]
    assert np.allclose(tensors[PREFIX + "classifier.bias"], 0.25 * heads[0] + 0.75 * heads[1])


def test_a_smaller_rank_reports_what_it_loses(pair: list[Path], tmp_path: Path) -> None:
    facts = merge_adapters(pair, tmp_path / "out")
    assert facts["rank"] == 3
    missed, wanted = [], []
    for module, scalings in SCALINGS.items():
        exact = np.mean([change_of(f, module, s) for f, s in zip(pair, scalings, strict=True)], axis=0)
        wanted.append(exact.ravel())
        missed.append((exact - change_of(tmp_path / "out", module)).ravel())
    expected = np.linalg.norm(np.concatenate(missed)) / np.linalg.norm(np.concatenate(wanted))
    assert expected > 0.01
    assert np.isclose(facts["error"], expected, rtol=1e-4)


def test_a_soup_is_the_mean_and_one_adapter_is_itself(pair: list[Path], tmp_path: Path) -> None:
    merge_adapters(pair, tmp_path / "soup", "soup")
    merge_adapters(pair, tmp_path / "mean", weights=[7, 7])
    merge_adapters(pair[:1], tmp_path / "one")
    for module, (scaling, _) in SCALINGS.items():
        assert np.allclose(change_of(tmp_path / "soup", module), change_of(tmp_path / "mean", module), atol=1e-6)
        assert np.allclose(change_of(tmp_path / "one", module), change_of(pair[0], module, scaling), atol=1e-5)


RULES: dict[str, Callable[[Matrix], Matrix]] = {
    "ties": lambda x: ties(x, density=0.5, scale=0.5),
    "breadcrumbs": lambda x: breadcrumbs(x, [x.shape[1]], density=0.5, scale=0.5),
    "pcb": lambda x: pcb(x, density=0.5, scale=0.5),
}


@pytest.mark.parametrize("method", RULES)
def test_other_methods_act_on_the_dense_change(pair: list[Path], tmp_path: Path, method: str) -> None:
    facts = merge_adapters(pair, tmp_path / "out", method, rank=7, density=0.5, scale=0.5)
    assert facts["error"] == 0
    cut = merge_adapters(pair, tmp_path / "cut", method, rank=1, density=0.5, scale=0.5)
    assert 0.05 < cut["error"] < 1
    for module, scalings in SCALINGS.items():
        changes = [change_of(folder, module, s) for folder, s in zip(pair, scalings, strict=True)]
        merged = RULES[method](np.stack([change.ravel() for change in changes])).reshape(SHAPES[module])
        assert np.allclose(change_of(tmp_path / "out", module), merged, atol=1e-4)
        assert np.linalg.matrix_rank(change_of(tmp_path / "cut", module), tol=1e-5) == 1


def test_a_merge_does_not_depend_on_the_gauge(pair: list[Path], tmp_path: Path) -> None:
    config, tensors = read_adapter(pair[1])
    gauge = np.random.default_rng(0).standard_normal((3, 3)) + 3 * np.eye(3)
    turned = {
        name: np.linalg.solve(gauge, values) if "lora_A" in name else values @ gauge if "lora_B" in name else values
        for name, values in tensors.items()
    }
    other = write(tmp_path / "c", {n: v.astype(np.float32) for n, v in turned.items()}, **config)
    for method in ("mean", "ties"):
        merge_adapters(pair, tmp_path / method, method, rank=7)
        merge_adapters([pair[0], other], tmp_path / f"{method}-turned", method, rank=7)
        for module in SHAPES:
            merged = change_of(tmp_path / f"{method}-turned", module)
            assert np.allclose(merged, change_of(tmp_path / method, module), atol=1e-4)


def test_bf16_is_read_without_loss(tmp_path: Path) -> None:
    from safetensors.torch import save_file as save_torch

    values = {name: torch.from_numpy(array).bfloat16() for name, array in tensors_of(1).items()}
    write(tmp_path / "a", tensors_of(1))
    save_torch(values, tmp_path / "a" / "adapter_model.safetensors")
    tensors = read_adapter(tmp_path / "a")[1]
    assert all(np.array_equal(tensors[name], values[name].float().numpy()) for name in values)
    assert describe_adapter(tmp_path / "a")["parameters"] == sum(v.numel() for v in values.values())


# Against peft


def bert() -> BertForSequenceClassification:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    config = BertConfig(vocab_size=40, max_position_embeddings=16, num_labels=3, initializer_range=0.3, **sizes)
    return BertForSequenceClassification(config).eval()


def test_peft_loads_the_result_with_the_logits_of_the_mean(tmp_path: Path) -> None:
    """The base plus the mean of the dense changes, and the mean of the heads: that is what the folder must hold."""
    folders: list[Path] = []
    total: dict[str, torch.Tensor] = {}
    for number, (rank, alpha, rslora) in enumerate([(2, 4, False), (3, 5, True), (1, 1, False)]):
        config = LoraConfig(
            r=rank,
            lora_alpha=alpha,
            use_rslora=rslora,
            target_modules=["query", "dense"],
            modules_to_save=["classifier"],
        )
        model = get_peft_model(bert(), config)
        torch.manual_seed(number)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    parameter.add_(0.3 * torch.randn_like(parameter) * ("lora_A" not in name))
        model.save_pretrained(tmp_path / str(number))
        folders.append(tmp_path / str(number))
        for name, parameter in model.merge_and_unload().named_parameters():
            total[name] = total.get(name, torch.zeros(())) + parameter.detach().double() / 3
    merge_adapters(folders, tmp_path / "out", rank=6)

    expected = bert()
    expected.load_state_dict({name: values.float() for name, values in total.items()}, strict=True)
    merged = PeftModel.from_pretrained(bert(), tmp_path / "out").eval()
    words = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        wanted, base = expected(words).logits, bert()(words).logits
        assert torch.allclose(merged(words).logits, wanted, atol=1e-5)
        assert (base - wanted).abs().max() > 0.1  # the negative control: there is something to get wrong
        merge_adapters(folders, tmp_path / "cut", rank=1)
        cut = PeftModel.from_pretrained(bert(), tmp_path / "cut").eval()
        assert (cut(words).logits - wanted).abs().max() > 1e-3


# Mistakes


def spoil(folder: Path, name: str, values: Matrix | None) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors.pop(name)
    save_file(tensors | ({} if values is None else {name: np.ascontiguousarray(values)}), path)


def configure(folder: Path, **settings: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


QUERY = PREFIX + "layer.0.query.lora_"
BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "another base": (
        lambda f: configure(f, base_model_name_or_path="org/other"),
        "different bases: org/base and org/other",
    ),
    "no B": (lambda f: spoil(f, QUERY + "B.weight", None), "lacks a factor"),
    "no A": (lambda f: spoil(f, QUERY + "A.weight", None), "lacks a factor"),
    "transposed A": (
        lambda f: spoil(f, QUERY + "A.weight", np.ones((5, 3), np.float32)),
        "A (5, 3) and B (6, 3), but rank 3",
    ),
    "transposed B": (
        lambda f: spoil(f, QUERY + "B.weight", np.ones((3, 6), np.float32)),
        "needs A (r, in) and B (out, r)",
    ),
    "another shape": (lambda f: spoil(f, QUERY + "A.weight", np.ones((3, 9), np.float32)), "(6, 5) and (6, 9)"),
    "another head": (lambda f: spoil(f, PREFIX + "classifier.bias", None), "are in one of them alone"),
    "NaN": (lambda f: spoil(f, QUERY + "A.weight", np.full((3, 5), np.nan, np.float32)), "not finite"),
    "infinity": (lambda f: spoil(f, PREFIX + "classifier.bias", np.full(3, np.inf, np.float32)), "not finite"),
    "integers": (lambda f: spoil(f, PREFIX + "classifier.bias", np.ones(3, np.int64)), "save it as fp32"),
    "another method": (lambda f: configure(f, peft_type="IA3"), "only plain LoRA"),
    "DoRA": (lambda f: configure(f, use_dora=True), "only plain LoRA"),
    "a start that moves the base": (lambda f: configure(f, init_lora_weights="pissa"), "only plain LoRA"),
    "no alpha": (lambda f: configure(f, lora_alpha=None), "lora_alpha = None"),
    "no config": (lambda f: (f / "adapter_config.json").unlink(), "adapter_config.json is missing"),
    "no table": (lambda f: (f / "adapter_config.json").write_text("[1]"), "damaged adapter"),
    "a cut file": (lambda f: (f / "adapter_model.safetensors").write_bytes(b"\0" * 20), "damaged adapter"),
    "a pickle": (lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"), "safetensors is missing"),
}


@pytest.mark.parametrize(("damage", "message"), BROKEN.values(), ids=BROKEN.keys())
def test_adapters_that_cannot_be_merged(
    pair: list[Path], tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    damage(pair[1])
    with pytest.raises(ModelError) as caught:
        merge_adapters(pair, tmp_path / "out")
    assert message in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_an_adapter_without_factors_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", {PREFIX + "classifier.bias": np.ones(3, np.float32)})
    with pytest.raises(ModelError, match="no LoRA factor"):
        merge_adapters([folder], tmp_path / "out")


def command(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    return in_process(capsys, "adapter", "merge", *arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "median"], "no such method. There are mean, soup, ties"),
        (["--method", "fisher"], "--method fisher: it looks at data"),
        (["--method", "greedy-soup"], "--method greedy-soup: it looks at data"),
        (["--data", "rows.jsonl"], "mean looks at no data; it belongs to fisher, greedy-soup"),
        (["--method", "fisher", "--data", "rows.jsonl"], "--data rows.jsonl: no such file"),
        (["--method", "greedy-soup", "--data", "rows.jsonl", "--weights", "1,2"], "weighs all adapters equally"),
        (["--method", "soup", "--weights", "1,2"], "weighs all adapters equally"),
        (["--weights", "1,x"], "write numbers with commas"),
        (["--weights", "1,2,3"], "3 weights for 2 changes"),
        (["--weights", "0,0"], "not all zero"),
        (["--weights=-1,1"], "not negative"),
        (["--weights", "nan,1"], "finite"),
        (["--density", "0.5"], "mean keeps every entry"),
        (["--method", "ties", "--density", "0"], "density 0.0"),
        (["--method", "breadcrumbs", "--density", "1"], "density 1.0 and top 0.01"),
        (["--scale", "inf"], "scale must be finite"),
        (["--rank", "0"], "rank at least 1"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_options_are_one_message_and_exit_code_2(
    pair: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    code, _, errors = command(capsys, *pair, "--out", tmp_path / "out", *options)
    assert code == 2
    assert errors.startswith("fedapt: ")
    assert message in errors
    assert errors.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_command_writes_an_adapter_and_says_so(
    pair: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, text, _ = command(capsys, *pair, "--out", tmp_path / "out", "--weights", "1,3")
    assert code == 0
    assert "mean of 2 adapters, rank 3, 2 modules, 1 other tensors" in text
    assert "a larger --rank loses less" in text
    code, document, _ = command(capsys, *pair, "--out", tmp_path / "all", "--rank", "9", "--json")
    facts = json.loads(document)
    assert code == 0
    assert facts["error"] == 0
    assert facts["weights"] == [0.5, 0.5]
    assert describe_adapter(tmp_path / "all")["rank"] == 9
    code, _, errors = command(capsys, *pair, "--out", pair[0])
    assert code == 2
    assert "exists already" in errors


def test_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    code, text, _ = command(capsys, "--help")
    assert code == 0
    assert "Example:" in text


def test_python_raises_what_the_command_prints(pair: list[Path], tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="nothing to merge"):
        merge_adapters([], tmp_path / "out")
    with pytest.raises(OutputError, match="exists already"):
        merge_adapters(pair, tmp_path)
