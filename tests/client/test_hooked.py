"""A client whose model no cohort takes trains privately by Opacus' hooks, and comes to what one example after another gives."""

from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import BertConfig, BertForSequenceClassification

from fedapt.client import private
from fedapt.client.adapted import AdaptedModel, adapt
from fedapt.client.client import Client
from fedapt.client.hooked import Hooked
from fedapt.client.tasks import Batch, SequenceClassification
from fedapt.kernels.cohort import Looped, Stack
from fedapt.protocols.update import Update

from .clients import assignments_of, change_of, sites_of, spec_of, state_of
from .test_trainer import TEXT

EXAMPLE_LEVEL = (
    "privacy.unit=example",
    "privacy.epsilon=500",
    "privacy.noise_multiplier=0.7",
    "privacy.noise=simulation",  # so that two trainings can be compared
    "recipe.weighting=uniform",
    "local.steps=3",
)


def stubborn() -> AdaptedModel:
    """Biases that train beside LoRA, and a layer that looks at its input's values: neither kernel takes it."""
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["query"], bias="all", modules_to_save=["classifier"])
    model = get_peft_model(BertForSequenceClassification(BertConfig(**TEXT, num_labels=3)), config)
    layer = model.get_submodule("base_model.model.bert.encoder.layer.1")
    layer.register_forward_pre_hook(lambda _, given: None if float(given[0].detach().abs().max()) < 1e6 else given)
    return adapt(model, SequenceClassification(None, 16))


def trained(client: Client) -> Update:
    (update,) = client.train(assignments_of(client, [1], state_of(client)))
    return update


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many examples each call of the hooks was given."""
    counted: list[int] = []
    call = Hooked.__call__

    def counting(self: Hooked, values: Stack, batch: Batch) -> Stack:
        counted.append(len(batch.shapes))
        return call(self, values, batch)

    monkeypatch.setattr(Hooked, "__call__", counting)
    return counted


def test_hooks_take_the_place_of_the_loop(monkeypatch: pytest.MonkeyPatch, calls: list[int]) -> None:
    adapted, sites = stubborn(), sites_of({1: 12})
    client = Client(spec_of(*EXAMPLE_LEVEL), adapted, sites)
    start = adapted.read()
    hooked = change_of(client, trained(client))
    assert isinstance(client._forward, Looped)
    assert len(calls) > 1, "the comparison, and training"
    assert max(calls[1:]) > 1, "several examples at once"
    adapted.write(start)
    monkeypatch.setattr(private, "hooks_that_agree", lambda *_: None)
    before = len(calls)
    looped = change_of(client, trained(client))
    assert len(calls) == before
    assert np.linalg.norm(hooked - looped) <= 1e-5 * np.linalg.norm(looped)
    assert np.linalg.norm(looped) > 0


def test_hooks_that_are_wrong_are_not_taken(monkeypatch: pytest.MonkeyPatch, calls: list[int]) -> None:
    """One tensor's gradients of another example, as if a module had mixed its rows."""
    adapted, sites = stubborn(), sites_of({1: 12})
    client = Client(spec_of(*EXAMPLE_LEVEL), adapted, sites)
    call = Hooked.__call__

    def mixing(self: Hooked, values: Stack, batch: Batch) -> Stack:
        found: dict[str, Any] = dict(call(self, values, batch))
        name = next(name for name in found if "lora_A" in name)
        return {**found, name: found[name].roll(1, 0)}

    monkeypatch.setattr(Hooked, "__call__", mixing)
    trained(client)
    assert len(calls) == 1, "the comparison alone"
