"""Fisher information: the closed form of a linear softmax, one example after another, and what of it travels."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedapt.client.information import EXAMPLES, FisherInformation, drawn
from fedapt.client.tasks import Examples
from fedapt.kernels.cohort import Looped
from fedapt.protocols.codecs import uplink_of
from fedapt.protocols.layout import AdapterLayout, Flat
from fedapt.protocols.spec import Local

from .clients import RAGGED, assignments_of, client_of, state_of
from .test_trainer import BASES, examples_for, forward_of, model_of, stock_batch, stock_loss

LOCAL = Local(optimizer="sgd", learning_rate=0.1)


def measured(kind: str, trained: AdapterLayout, examples: Examples, at: Flat, *, looped: bool = False) -> Flat:
    adapted = model_of(kind)
    forward = Looped(adapted.model) if looped else forward_of(adapted, trained)
    own = np.arange(len(examples))
    return FisherInformation(adapted, forward, trained, LOCAL).diagonal(examples, own, at)


def one_by_one(kind: str, trained: AdapterLayout, examples: Examples, at: Flat) -> Flat:
    """The plain reference: Hugging Face's own loss of each example alone, its gradient squared."""
    adapted = model_of(kind)
    model = copy.deepcopy(adapted.model).eval()
    parameters = [model.get_parameter(adapted.parameter_names[t.name]) for t in trained.tensors]
    with torch.no_grad():
        for parameter, values in zip(parameters, trained.split(at).values(), strict=True):
            parameter.copy_(torch.from_numpy(values))
    total = np.zeros(trained.size)
    for index in range(len(examples)):
        gradients = torch.autograd.grad(stock_loss(model, stock_batch(kind, examples, [index])), parameters)
        total += np.concatenate([g.double().numpy().ravel() for g in gradients]) ** 2
    return (total / len(examples)).astype(np.float32)


def point(kind: str, trained: AdapterLayout, seed: int) -> Flat:
    adapted = model_of(kind)
    noise = np.random.default_rng(seed).standard_normal(trained.size)
    return (adapted.layout.cut(adapted.read(), trained) + 0.1 * noise).astype(np.float32)


def test_a_linear_softmax_has_the_closed_form() -> None:
    """A head over frozen features h: ∂/∂W = (p − y)·hᵀ and ∂/∂b = p − y, so F is a mean of (p − y)²·h²."""
    adapted, examples = model_of("bert"), examples_for("bert", 9, 0)
    trained = adapted.layout.select({"other"})
    at = point("bert", trained, 1)
    features: list[Any] = []
    head = adapted.model.get_submodule("base_model.model.classifier")
    hook = head.register_forward_hook(lambda _, given_, __: features.append(given_[0].detach().double().numpy()[0]))
    with torch.no_grad():
        for index in range(9):
            batch = stock_batch("bert", examples, [index])
            adapted.model(**{key: value for key, value in batch.items() if key != "labels"})
    hook.remove()
    weight, bias = (trained.split(at.astype(np.float64))[t.name] for t in trained.tensors)
    if weight.ndim == 1:
        weight, bias = bias, weight
    h = np.stack(features)
    logits = h @ weight.T + bias
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    missed = (p - np.eye(3)[[int(label) for label in examples.labels]]) ** 2
    expected = {2: missed.T @ h**2 / 9, 1: missed.mean(axis=0)}
    found = measured("bert", trained, examples, at)
    for tensor in trained.tensors:
        np.testing.assert_allclose(trained.view(found, tensor.name), expected[len(tensor.shape)], rtol=1e-3, atol=1e-9)


@settings(max_examples=12)
@given(st.sampled_from(sorted(BASES)), st.integers(1, 9), st.integers(0, 99), st.booleans())
def test_examples_measured_together_are_examples_one_by_one(kind: str, count: int, seed: int, looped: bool) -> None:
    trained = model_of(kind).layout.select({"B", "other"})
    examples, at = examples_for(kind, count, seed), point(kind, trained, seed)
    found = measured(kind, trained, examples, at, looped=looped)
    expected = one_by_one(kind, trained, examples, at)
    assert found.dtype == np.float32
    assert found.min() >= 0
    assert np.linalg.norm(found - expected) <= 1e-3 * np.linalg.norm(expected)


def test_a_chunk_may_hold_one_example(monkeypatch: pytest.MonkeyPatch) -> None:
    trained = model_of("bert").layout.select({"B", "other"})
    examples, at = examples_for("bert", 7, 3), point("bert", trained, 3)
    together = measured("bert", trained, examples, at)
    monkeypatch.setattr("fedapt.client.example_gradients.GRADIENT_BYTES", 1)
    np.testing.assert_allclose(measured("bert", trained, examples, at), together, rtol=1e-3, atol=1e-9)


def test_at_most_so_many_examples_by_key() -> None:
    client = client_of("recipe.name=ffa", "recipe.aggregator=fisher")
    first, second = (assignments_of(client, [10, 40], state_of(client), round_) for round_ in (1, 2))
    many, few = np.arange(100, 300), np.arange(5, 9)
    found = drawn(many, client.spec, first[0])
    assert len(found) == EXAMPLES
    assert (np.diff(found) > 0).all()
    assert np.isin(found, many).all()
    assert np.array_equal(drawn(many, client.spec, first[0]), found)
    for other in (first[1], second[0]):
        assert not np.array_equal(drawn(many, client.spec, other), found)
    assert drawn(few, client.spec, first[0]).tolist() == few.tolist()


@pytest.mark.parametrize("recipe", ["ffa", "fedsvd", "refresh", "rolora"])
def test_a_node_sends_it_after_its_change_at_the_point_that_it_has_come_to(recipe: str) -> None:
    """The change is that of a run without information; at the start the information is another (the control)."""
    client, plain = client_of(f"recipe.name={recipe}", "recipe.aggregator=fisher"), client_of(f"recipe.name={recipe}")
    uplink, nodes = uplink_of(client.spec), [node for node, count in RAGGED.items() if count]
    state = state_of(client, 3)
    asked = assignments_of(client, nodes, state)
    trained = client.shared.sent(1)
    start = client.adapted.layout.cut(client.shared.whole(state, 1), trained)
    for update, reference in zip(client.train(asked), plain.train(asked), strict=True):
        assert len(update.payload) == uplink.size(trained) == len(reference.payload) + 2 * trained.size
        change, information = uplink.decode(update.payload, trained)
        assert information is not None
        np.testing.assert_allclose(change, np.frombuffer(reference.payload, np.float32), atol=1e-6)
        (again,) = client.train([a for a in asked if a.node == update.node])
        _, repeated = uplink.decode(again.payload, trained)
        assert repeated is not None
        np.testing.assert_allclose(repeated, information, rtol=0.02, atol=1e-9)
        assert client._forward is not None
        measure = FisherInformation(client.adapted, client._forward, trained, client.spec.local)
        own = client.sites.indices[update.node]
        there, here = (measure.diagonal(client.sites.examples, own, at) for at in (start + change, start))
        np.testing.assert_allclose(information, there, rtol=0.02, atol=1e-9)
        assert np.linalg.norm(information - here) > 0.02 * np.linalg.norm(here)
