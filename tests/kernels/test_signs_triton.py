"""The Triton path against the NumPy references: on a GPU where there is one, else in Triton's interpreter."""

import os
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import torch

from fedapt.kernels.directions import TILE, Directions
from fedapt.kernels.signs import accumulate_reference, perturb_reference, project_reference

if find_spec("triton") is None:
    pytest.skip("Triton is not installed: `pip install 'fedapt[gpu]'` brings it (Linux)", allow_module_level=True)

device = "cuda" if torch.cuda.is_available() else "cpu"
if device == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is imported
fast: Any = import_module("fedapt.kernels.signs_triton")

DIRECTIONS = Directions(2**63 + 5, [1, 2, 2**32 - 1], [0, 2**32 - 1, 3])
CODES = [1, -128, 2**20]
SHAPES = [(n, 0) for n in (0, 1, 127, 128, 129)] + [(1, 127), (129, TILE - 64), (TILE + 9, 2**39 - 64)]
shapes = pytest.mark.parametrize(("size", "first"), SHAPES)


def floats(size: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    random = np.random.default_rng(size)
    return (random.standard_normal(size) * 10.0 ** random.integers(-8, 8, size)).astype(np.float32)


@shapes
def test_perturb_has_the_bits_of_its_reference(size: int, first: int) -> None:
    w = floats(size)
    for epsilon in (0.1, -3.0):
        got = fast.perturb(torch.from_numpy(w).to(device), epsilon, DIRECTIONS[1], first)
        expected = perturb_reference(w, epsilon, DIRECTIONS[1], first)
        assert got.cpu().numpy().tobytes() == expected.tobytes()


@shapes
def test_accumulate_has_the_bits_of_its_reference(size: int, first: int) -> None:
    expected = np.random.default_rng(size).integers(-(2**31), 2**31, size, np.int32)
    acc = torch.from_numpy(expected.copy()).to(device)
    fast.accumulate(acc, DIRECTIONS, CODES, first)
    accumulate_reference(expected, DIRECTIONS, CODES, first)
    assert acc.cpu().numpy().tobytes() == expected.tobytes()


@shapes
def test_project_has_the_bits_of_its_reference(size: int, first: int) -> None:
    delta = floats(size)
    got = fast.project(torch.from_numpy(delta).to(device), DIRECTIONS, first)
    assert got.tobytes() == project_reference(delta, DIRECTIONS, first).tobytes()


def test_no_directions_change_nothing() -> None:
    none, acc = Directions(1, [], []), torch.arange(5, dtype=torch.int32, device=device)
    fast.accumulate(acc, none, [])
    assert acc.tolist() == [0, 1, 2, 3, 4]
    assert fast.project(torch.ones(5, device=device), none).shape == (0,)


def test_tensors_that_a_kernel_would_misread_are_refused() -> None:
    for wrong in (torch.zeros(4, dtype=torch.float64), torch.zeros(2, 2), torch.zeros(8)[::2]):
        with pytest.raises(ValueError, match="contiguous vector"):
            fast.perturb(wrong, 0.1, DIRECTIONS[0])
        with pytest.raises(ValueError, match="contiguous vector"):
            fast.accumulate(wrong, DIRECTIONS, CODES)
