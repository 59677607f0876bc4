from typing import Any

import numpy as np
import pytest
import torch

from fedapt.protocols.layout import AdapterLayout, Flat, TensorSpec
from fedapt.protocols.spec import Recipe
from fedapt.server.optimizers import ADAM_BETAS, ADAM_TAU, NOVOGRAD_BETA, NOVOGRAD_TAU, Buffers, step

ROUNDS, SIZE = 12, 20
LAYOUT = AdapterLayout([TensorSpec("a", (3, 4), "other"), TensorSpec("b", (8,), "other")])


def changes(seed: int = 0) -> Any:
    random = np.random.default_rng(seed)
    return (random.standard_normal((ROUNDS, SIZE)) * 10.0 ** random.integers(-4, 2, (1, SIZE))).astype(np.float32)


def walk(settings: Recipe, taken: Any) -> tuple[Flat, Buffers]:
    """The state after all rounds from zero, and the last buffers."""
    state, buffers = np.zeros(SIZE, np.float32), Buffers()
    for change in taken:
        given = {name: buffer.copy() for name, buffer in buffers.items()}
        moved, after = step(change, buffers, settings, LAYOUT)
        assert moved.dtype == np.float32
        assert all(buffer.dtype == np.float32 for buffer in after.values())
        assert all(np.array_equal(buffers[name], buffer) for name, buffer in given.items()), "buffers are not changed"
        state, buffers = state + moved, after
    return state, buffers


def torch_walk(taken: Any, **options: Any) -> Any:
    """The same by torch.optim.SGD, whose gradient is minus the change."""
    state = torch.zeros(SIZE, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([state], **options)
    for change in taken:
        state.grad = -torch.from_numpy(change.astype(np.float64))
        optimizer.step()
    return state.detach().numpy()


def test_plain_sgd_of_rate_one_adds_the_change() -> None:
    change = changes()[0]
    moved, buffers = step(change, {}, Recipe(), LAYOUT)
    assert np.array_equal(moved, change)
    assert buffers == {}


@pytest.mark.parametrize("rate", [1.0, 0.3])
def test_sgd_is_torchs(rate: float) -> None:
    state, buffers = walk(Recipe(optimizer="sgd", learning_rate=rate), changes())
    assert buffers == {}
    np.testing.assert_allclose(state, torch_walk(changes(), lr=rate), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rate", [1.0, 0.3])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_nesterov_is_torchs(rate: float, momentum: float) -> None:
    state, buffers = walk(Recipe(optimizer="nesterov", learning_rate=rate, momentum=momentum), changes())
    assert set(buffers) == {"momentum"}
    expected = torch_walk(changes(), lr=rate, momentum=momentum, nesterov=momentum > 0)
    np.testing.assert_allclose(state, expected, rtol=1e-5, atol=1e-5)


def test_nesterov_is_not_sgd() -> None:
    state, _ = walk(Recipe(optimizer="nesterov"), changes())
    assert np.abs(state - torch_walk(changes(), lr=1.0)).max() > 0.1


def test_adam_is_fedadam() -> None:
    """FedAdam (arXiv 2003.00295, algorithm 2), value by value in Python's floats; it has no bias correction."""
    state, buffers = walk(Recipe(optimizer="adam", learning_rate=0.1), changes())
    (beta1, beta2), tau = ADAM_BETAS, ADAM_TAU
    for i in range(SIZE):
        x = m = v = 0.0
        for change in changes():
            m = beta1 * m + (1 - beta1) * float(change[i])
            v = beta2 * v + (1 - beta2) * float(change[i]) ** 2
            x += 0.1 * m / (v**0.5 + tau)
        np.testing.assert_allclose([state[i], buffers["momentum"][i]], [x, m], rtol=2e-5, atol=1e-6)
        np.testing.assert_allclose(buffers["second"][i], v, rtol=1e-5)


def test_novograd_divides_a_tensor_by_its_root_mean_square() -> None:
    """NovoGrad (arXiv 1905.11286, algorithm 1) with means for sums, tensor by tensor in float64."""
    state, buffers = walk(Recipe(optimizer="novograd", learning_rate=0.1, momentum=0.8), changes())
    for number, part in enumerate((slice(0, 12), slice(12, 20))):
        x, m, v = np.zeros(part.stop - part.start), np.zeros(part.stop - part.start), None
        for change in changes().astype(np.float64)[:, part]:
            square = float(np.mean(change**2))
            v = square if v is None else NOVOGRAD_BETA * v + (1 - NOVOGRAD_BETA) * square
            m = 0.8 * m + 0.2 * change / (v**0.5 + NOVOGRAD_TAU)
            x += 0.1 * m
        np.testing.assert_allclose(state[part], x, rtol=1e-4, atol=1e-6)
        assert buffers["second"][number] == pytest.approx(v, rel=1e-5)


@pytest.mark.parametrize("optimizer", ["sgd", "nesterov", "novograd", "adam"])
def test_no_change_is_no_step(optimizer: Any) -> None:
    state, _ = walk(Recipe(optimizer=optimizer), np.zeros((ROUNDS, SIZE), np.float32))
    assert not state.any()
