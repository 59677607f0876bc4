"""The example says that rules on factors fail and rules on products hold: here its own numbers are held to that."""

import importlib.util
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "robust.py"
HOLD = ("products: Krum", "products: Multi-Krum", "products: geometric median")
ATTACKS = ("times 100", "sign flipped")


def test_the_example_shows_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    spec = importlib.util.spec_from_file_location("robust_example", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    errors: dict[str, dict[str, float]] = example.main()
    printed = capsys.readouterr().out

    for rule in HOLD:
        assert max(errors[rule].values()) < 1.2 * example.NOISE, rule
    for rule in ("factors: mean", "factors: coordinate median"):
        assert min(errors[rule].values()) > 0.8, rule  # nearly as bad as no update, attack or not
    assert errors["factors: Krum"]["sign flipped"] > 1.9  # it takes the attacker
    assert errors["products: mean"]["times 100"] > 10
    assert errors["products: clipped mean"]["times 100"] < example.NOISE
    assert errors["products: clipped mean"]["sign flipped"] > 0.3
    assert all(rule in printed for rule in errors)
    assert all(set(row) == {"nobody", *ATTACKS} for row in errors.values())
