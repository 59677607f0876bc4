"""DP-SGD at a node: each example's gradient is its own, and nothing leaves that was not clipped and noised."""

import copy
from collections.abc import Iterator, Sequence
from math import inf, sqrt
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus import GradSampleModule
from peft import IA3Config, LoraConfig, get_peft_model
from scipy.stats import binom, chisquare
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification

from fedapt.client import example_gradients as gradients_module
from fedapt.client.adapted import AdaptedModel, adapt
from fedapt.client.hooked import Hooked, hooks_that_agree
from fedapt.client.private import PrivateTrainer
from fedapt.client.tasks import Examples, Indices, member_losses
from fedapt.client.trainer import Member, Moments
from fedapt.kernels.cohort import Looped, Stack
from fedapt.privacy.events import Poisson
from fedapt.privacy.example_level import ExampleLevel, Sums
from fedapt.privacy.noise import Floats, Values
from fedapt.privacy.randomness import Integers, Randomness, SecretRandomness, SimulationRandomness
from fedapt.privacy.sampling import fixed_size
from fedapt.protocols.errors import PrivacyError
from fedapt.protocols.layout import AdapterLayout, Flat
from fedapt.protocols.spec import Local

from .clients import client_of
from .test_trainer import (
    BASES,
    CLASSIFY,
    TEXT,
    examples_for,
    forward_of,
    model_of,
    relative,
    roles,
    start_of,
    stock_batch,
    stock_loss,
    trained_of,
)

SGD = Local(optimizer="sgd", learning_rate=0.1, batch_size=4)
ADAMW = Local(optimizer="adamw", learning_rate=1e-3, weight_decay=0.01, batch_size=4)


def trainer_of(
    adapted: AdaptedModel,
    *,
    kind: type[ExampleLevel] = ExampleLevel,
    clip: float = 1.0,
    noise: float = 0.0,
    local: Local = SGD,
    trained: AdapterLayout | None = None,
    secret: bool = False,
) -> PrivateTrainer:
    """Its batches can be drawn again (`batches_of`), unless it is secret."""
    own = adapted.layout if trained is None else trained
    return PrivateTrainer(
        adapted,
        forward_of(adapted, own),
        own,
        local,
        lambda member: kind(clip, noise, local.batch_size, len(member.batches[0]), own.size),
        lambda member: SecretRandomness() if secret else SimulationRandomness(member.dropout_key),
    )


def member_of(count: int, steps: int, key: int = 0, start: Flat | None = None) -> Member:
    """A node with `count` examples, all of them there for each of its steps."""
    return Member([np.arange(count)] * steps, key, start)


def batches_of(trainer: PrivateTrainer, member: Member) -> list[Indices]:
    mechanism, source = trainer.mechanism(member), trainer.source(member)
    return [own[mechanism.draw(source)] for own in member.batches]


def values_of(adapted: AdaptedModel, trained: AdapterLayout) -> Stack:
    names = [adapted.parameter_names[t.name] for t in trained.tensors]
    return {name: adapted.model.get_parameter(name).detach()[None].clone() for name in names}


def by_length(examples: Examples, batch: Indices) -> Indices:
    ordered: Indices = batch[np.argsort(examples.lengths[batch], kind="stable")]
    return ordered


def gradients_of(trainer: PrivateTrainer, examples: Examples, batch: Indices) -> Floats:
    values = values_of(trainer.adapted, trainer.trained)
    parts = list(trainer.gradients(examples, values, batch))
    return np.concatenate([np.empty((0, trainer.trained.size), np.float32), *parts])


def one_by_one(kind: str, adapted: AdaptedModel, trained: AdapterLayout, examples: Examples, batch: Indices) -> Floats:
    """Independent of the code under test: each example alone, through the stock model and its own loss."""
    parameters = [adapted.parameters[t.name] for t in trained.tensors]
    rows = [np.empty((0, trained.size), np.float32)]
    for index in by_length(examples, batch):
        loss = stock_loss(adapted.model, stock_batch(kind, examples, [index]))
        gradients = torch.autograd.grad(loss, parameters, materialize_grads=True)
        rows.append(torch.cat([g.flatten() for g in gradients])[None].numpy())
    return np.concatenate(rows)


def by_opacus(adapted: AdaptedModel, trained: AdapterLayout, examples: Examples, batch: Indices) -> Floats:
    """Opacus' hooks over one padded batch, in training mode without dropout."""
    model, names = copy.deepcopy(adapted.model), [adapted.parameter_names[t.name] for t in trained.tensors]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
    for module in model.train().modules():
        if hasattr(module, "p"):
            module.p = 0.0
        for own in ("dropout_prob", "attention_dropout"):
            if hasattr(module, own):
                setattr(module, own, 0.0)
    rows = adapted.task.collate(examples, [np.array([i]) for i in by_length(examples, batch)])
    logits = GradSampleModule(model, loss_reduction="sum")(**rows.inputs).logits
    torch.autograd.backward(member_losses(adapted.task, logits, rows.labels, len(batch)).sum())
    found: list[Any] = [model.get_parameter(name).grad_sample for name in names]
    flat: Floats = torch.cat([own.flatten(1) for own in found], 1).numpy()
    return flat


@pytest.mark.parametrize("kind", BASES)
@settings(max_examples=8)
@given(st.integers(0, 9), roles, st.integers(0, 9999))
def test_each_gradient_is_that_of_its_example_alone(kind: str, count: int, which: str, seed: int) -> None:
    adapted, examples = model_of(kind), examples_for(kind, 12, seed)
    trained = trained_of(adapted, which)
    batch = np.random.default_rng(seed).permutation(12)[:count]
    actual = gradients_of(trainer_of(adapted, trained=trained), examples, batch)
    expected = one_by_one(kind, adapted, trained, examples, batch)
    assert actual.shape == expected.shape == (count, trained.size)
    for own, alone in zip(actual, expected, strict=True):
        assert relative(own, alone) <= 1e-5


@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")  # what is below is frozen
@pytest.mark.parametrize("which", ["AB", "B"])
@pytest.mark.parametrize("kind", ["bert", "llama", "llama-head"])
def test_each_gradient_is_that_of_opacus(kind: str, which: str) -> None:
    adapted, examples = model_of(kind), examples_for(kind, 9, 3)
    trained = trained_of(adapted, which)
    actual = gradients_of(trainer_of(adapted, trained=trained), examples, np.arange(9))
    hooked = by_opacus(adapted, trained, examples, np.arange(9))
    for own, other in zip(actual, hooked, strict=True):
        assert relative(own, other) <= 1e-5
    assert relative(np.roll(actual, 1, 0), hooked) > 1e-1  # another example's gradient would be seen


@pytest.mark.parametrize("recipe", ["ffa", "fedsvd", "refresh", "fedit"])
def test_gradients_of_a_recipe(recipe: str) -> None:
    """`refresh` has frozen factors beside those that train."""
    client = client_of(f"recipe.name={recipe}")
    trained = client.shared.trained(1)
    adapted, examples = client.adapted, client.sites.examples
    actual = gradients_of(trainer_of(adapted, trained=trained), examples, np.arange(8))
    assert relative(actual, one_by_one("bert", adapted, trained, examples, np.arange(8))) <= 1e-5
    (result,) = trainer_of(adapted, trained=trained, noise=1.0).train(examples, [member_of(20, 2)])
    assert result.change.shape == (trained.size,)
    assert np.isfinite(result.change).all()


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_parts_change_nothing(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    adapted, examples = model_of(kind), examples_for(kind, 20, 1)
    trainer, batch = trainer_of(adapted), np.arange(20)
    reference = gradients_of(trainer, examples, batch)
    looped = PrivateTrainer(
        adapted, Looped(adapted.model), adapted.layout, SGD, trainer.mechanism, trainer.source
    )  # the plain reference: one example after another
    assert relative(gradients_of(looped, examples, batch), reference) <= 1e-5
    for name, value, parts in (
        ("chunk_tokens", lambda _: 1, 20),
        ("GRADIENT_BYTES", 3 * 4 * trainer.trained.size, range(7, 20)),
        ("LONGER", 100, 1),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(gradients_module, name, value)
            found = len(list(trainer.gradients(examples, values_of(adapted, trainer.trained), batch)))
            assert found in (parts if isinstance(parts, range) else [parts])
            assert relative(gradients_of(trainer, examples, batch), reference) <= 1e-5


def plain(kind: str, trainer: PrivateTrainer, examples: Examples, member: Member) -> Floats:
    """Stock training on the batches that the trainer draws: the sum of their losses, over a constant."""
    adapted, local = trainer.adapted, trainer.local
    model = copy.deepcopy(adapted.model).eval()
    parameters = [model.get_parameter(adapted.parameter_names[t.name]) for t in trainer.trained.tensors]
    before = torch.cat([p.detach().flatten() for p in parameters])
    kind_of = torch.optim.SGD if local.optimizer == "sgd" else torch.optim.AdamW
    optimizer = kind_of(parameters, lr=local.learning_rate, weight_decay=local.weight_decay)
    for batch in batches_of(trainer, member):
        optimizer.zero_grad()
        losses = [stock_loss(model, stock_batch(kind, examples, [i])) for i in batch]
        loss = torch.stack([0 * parameters[0].sum(), *losses]).sum() / trainer.mechanism(member).expected
        torch.autograd.backward(loss)
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        optimizer.step()
    change: Floats = (torch.cat([p.detach().flatten() for p in parameters]) - before).numpy()
    return change


@pytest.mark.parametrize("kind", BASES)
@settings(max_examples=5)
@given(st.integers(1, 12), st.integers(1, 2), roles, st.integers(0, 9999))
def test_without_noise_and_clip_it_is_plain_sgd(kind: str, count: int, steps: int, which: str, seed: int) -> None:
    adapted, examples = model_of(kind), examples_for(kind, count, seed)
    trainer = trainer_of(adapted, clip=inf, trained=trained_of(adapted, which))
    member = member_of(count, steps, seed)
    expected = plain(kind, trainer, examples, member)
    (result,) = trainer.train(examples, [member])
    assert np.linalg.norm(result.change - expected) <= 1e-6 * np.linalg.norm(start_of(adapted, trainer.trained))
    assert np.linalg.norm(result.change - expected) <= 1e-5 * np.linalg.norm(expected)


@pytest.mark.parametrize("local", [SGD, ADAMW])
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_without_noise_and_clip_it_is_plain_training_in_float64(kind: str, local: Local) -> None:
    adapted, examples = model_of(kind, torch.float64), examples_for(kind, 10, 2, torch.float64, shortest=3)
    trainer, member = trainer_of(adapted, clip=inf, local=local), member_of(10, 5, 7)
    (result,) = trainer.train(examples, [member])
    assert relative(result.change, plain(kind, trainer, examples, member)) <= 1e-9
    assert relative(result.change, plain(kind, trainer, examples, member_of(10, 5, 8))) > 1e-2  # other batches


def test_it_starts_where_the_member_does_and_leaves_the_model_as_it_was() -> None:
    adapted, examples = model_of("bert"), examples_for("bert", 6, 0)
    trainer, before = trainer_of(adapted, clip=inf), adapted.read()
    elsewhere = (before + 0.1 * np.random.default_rng(0).standard_normal(before.size)).astype(np.float32)
    given_, moved = trainer.train(examples, [member_of(6, 3), member_of(6, 3, start=elsewhere)])
    assert np.array_equal(adapted.read(), before)
    assert all(p.grad is None and not hasattr(p, "grad_sample") for p in adapted.model.parameters())
    adapted.write(elsewhere)
    (expected,) = trainer.train(examples, [member_of(6, 3)])
    adapted.write(before)
    assert relative(moved.change, expected.change) <= 1e-5
    assert relative(moved.change, given_.change) > 1e-2


def test_no_loss_leaves() -> None:
    (result,) = trainer_of(model_of("bert"), noise=1.0).train(examples_for("bert", 6, 0), [member_of(6, 3)])
    assert result.losses.shape == (0,)
    assert result.moments is None


def test_no_members_give_nothing() -> None:
    trainer, examples = trainer_of(model_of("bert"), noise=1.0), examples_for("bert", 2, 0)
    assert trainer.train(examples, []) == []


@pytest.mark.parametrize("secret", [True, False])
def test_the_event_of_a_training(secret: bool) -> None:
    trainer = trainer_of(model_of("bert"), noise=1.5, clip=0.5, secret=secret)
    event = trainer.event(member_of(20, 7))
    assert (event.unit, event.relation, event.count, event.secret) == ("example", "add-remove", 7, secret)
    assert event.sampling == Poisson(4 / 20)
    assert event.noise_multiplier == pytest.approx(1.5, rel=1e-12)
    assert event.sensitivity == pytest.approx(0.5, rel=1e-2)


def test_secret_noise_is_never_the_same() -> None:
    trainer = trainer_of(model_of("bert"), noise=1.0, secret=True)
    one, two = trainer.train(examples_for("bert", 4, 0), [member_of(4, 1), member_of(4, 1)])  # the batch is the same
    assert relative(one.change, two.change) > 0.5


@pytest.mark.parametrize(
    ("member", "message"),
    [
        (Member([np.arange(4), np.arange(9)], 0), "4 to 9 examples, and 4 are accounted"),
        (Member([np.arange(4)], 0, moments=Moments(np.zeros(1, np.float32), np.zeros(1, np.float32))), "moments"),
    ],
)
def test_what_the_mechanism_does_not_account_for_is_refused(member: Member, message: str) -> None:
    with pytest.raises(PrivacyError, match=message):
        trainer_of(model_of("bert"), noise=1.0).train(examples_for("bert", 9, 0), [member])


def test_an_example_that_is_not_finite_counts_as_zero() -> None:
    adapted, examples = model_of("vit"), examples_for("vit", 6, 0)
    broken = Examples(
        [np.where(i == 2, np.nan, x) for i, x in enumerate(examples.inputs)], examples.labels, examples.rows
    )
    local = Local(optimizer="sgd", learning_rate=0.1, batch_size=6)
    trainer, without = trainer_of(adapted, local=local), np.array([0, 1, 3, 4, 5])
    assert not np.isfinite(gradients_of(trainer, broken, np.arange(6))[2]).any()
    (result,) = trainer.train(broken, [member_of(6, 1)])
    others = trainer.mechanism(member_of(6, 1)).bounded(gradients_of(trainer, examples, without))
    assert relative(result.change, -0.1 * others / 6) <= 1e-5


# Planted bugs: each is caught by the test of what it breaks.


class LessNoise(ExampleLevel):
    def release(self, sums: object, source: Randomness) -> Values:
        return 0.9 * super().release([], source)


class SkipsEmpty(ExampleLevel):
    def release(self, sums: Any, source: Randomness) -> Values:
        parts = list(sums)
        return super().release(parts, source) if parts else np.zeros(self.dimensions)


class ActualSize(ExampleLevel):
    """Divides by the number of examples that were drawn (of a training of one step)."""

    def draw(self, source: Randomness) -> Integers:
        drawn = super().draw(source)
        self.__dict__["drawn"] = len(drawn)
        return drawn

    def release(self, sums: Any, source: Randomness) -> Values:
        actual: int = max(1, self.__dict__["drawn"])
        return super().release(sums, source) * self.expected / actual


class ClippedSum(ExampleLevel):
    def bounded(self, gradients: Floats) -> Sums:
        return super().bounded(gradients.sum(0, keepdims=True))


class HeadUnclipped(ExampleLevel):
    """The head is the end of the layout."""

    def bounded(self, gradients: Floats) -> Sums:
        head = sum(t.size for t in model_of("bert").layout.tensors if ".classifier." in t.name)
        adapter = gradients.copy()
        adapter[:, -head:] = 0
        unclipped: Sums = (gradients - adapter).sum(0)
        return super().bounded(adapter) + unclipped


class FixedSize(ExampleLevel):
    def draw(self, source: Randomness) -> Integers:
        return np.array(fixed_size(range(self.examples), self.batch_size, source))


FAR = 6
"""Standard errors: secret noise is another one in each run of the tests, so what is rare would still be seen."""


def noise_of(kind: type[ExampleLevel], steps: int, repeats: int) -> Values:
    """The noise in changes of trainings without a signal (no label counts), in units of what is charged."""
    adapted, count = model_of("bert"), 30
    examples = examples_for("bert", count, 0)
    silent = Examples(examples.inputs, list(np.full(count, -100)), examples.rows)
    local = Local(optimizer="sgd", learning_rate=0.1, batch_size=1)
    trainer = trainer_of(adapted, kind=kind, noise=1.3, clip=0.7, local=local, secret=True)
    results = trainer.train(silent, [member_of(count, steps, key) for key in range(repeats)])
    event = trainer.event(member_of(count, steps))
    scale = 0.1 * event.noise_std * sqrt(steps) / trainer.mechanism(member_of(count, steps)).expected
    return np.stack([result.change for result in results]).astype(np.float64) / scale


@pytest.mark.parametrize(
    ("kind", "honest"), [(ExampleLevel, True), (LessNoise, False), (SkipsEmpty, False), (ActualSize, False)]
)
@pytest.mark.parametrize("steps", [1, 4])
def test_the_change_has_the_noise_that_is_charged(kind: type[ExampleLevel], honest: bool, steps: int) -> None:
    """A third of the batches is empty; every step of a training adds its own noise."""
    noise = noise_of(kind, steps, 40)
    assert abs(noise.mean()) < FAR / sqrt(noise.size) or not honest
    assert (abs((noise**2).mean() - 1) < FAR * sqrt(2 / noise.size)) == honest


@pytest.mark.parametrize(
    ("kind", "honest"), [(ExampleLevel, True), (ActualSize, False), (ClippedSum, False), (HeadUnclipped, False)]
)
def test_the_change_is_the_clipped_sum_over_a_constant(kind: type[ExampleLevel], honest: bool) -> None:
    adapted, examples, bound = model_of("bert"), examples_for("bert", 12, 4), 0.05
    trainer = trainer_of(adapted, kind=kind, clip=bound)
    for key in range(6):
        member = member_of(12, 1, key)
        (batch,) = batches_of(trainer, member)
        if len(batch) not in (0, SGD.batch_size):
            break
    rows = one_by_one("bert", adapted, adapted.layout, examples, batch)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    assert len(batch) > 1
    assert norms.min() > bound
    (result,) = trainer.train(examples, [member])
    expected = -0.1 * (rows * bound / norms).sum(0) / SGD.batch_size
    assert (relative(result.change, expected) <= 1e-3) == honest  # a small change of larger fp32 numbers


@pytest.mark.parametrize(("kind", "honest"), [(ExampleLevel, True), (HeadUnclipped, False)])
def test_one_example_moves_a_step_by_no_more_than_is_charged(kind: type[ExampleLevel], honest: bool) -> None:
    adapted, examples = model_of("bert"), examples_for("bert", 5, 4)
    local = Local(optimizer="sgd", learning_rate=1.0, batch_size=1)
    trainer = trainer_of(adapted, kind=kind, clip=0.01, local=local)
    moved = [Examples([x], [y], np.arange(1)) for x, y in zip(examples.inputs, examples.labels, strict=True)]
    norms = [float(np.linalg.norm(trainer.train(own, [member_of(1, 1)])[0].change)) for own in moved]
    assert (max(norms) <= 0.01 * (1 + 1e-4)) == honest  # a change is the difference of two fp32 numbers


class Counting(PrivateTrainer):
    """Keeps what it trains on, and trains nothing."""

    seen: list[Indices]

    def gradients(self, examples: Examples, values: Stack, batch: Indices) -> Iterator[Floats]:
        self.seen.append(batch)
        return iter(())


@pytest.mark.parametrize(("kind", "honest"), [(ExampleLevel, True), (FixedSize, False)])
def test_batches_are_poisson_draws_of_the_nodes_own_examples(kind: type[ExampleLevel], honest: bool) -> None:
    plain_trainer = trainer_of(model_of("bert"), kind=kind, noise=1.0)
    trainer = Counting(**{name: getattr(plain_trainer, name) for name in plain_trainer.__dataclass_fields__})
    object.__setattr__(trainer, "seen", [])
    own = np.arange(100, 130)
    member = Member([own] * 1000, 3)
    trainer.train(examples_for("bert", 130, 0), [member])
    assert len(trainer.seen) == 1000
    assert all(np.isin(batch, own).all() for batch in trainer.seen)
    event = trainer.event(member)
    assert isinstance(event.sampling, Poisson)
    counts = np.bincount(np.minimum([len(batch) for batch in trainer.seen], 10), minlength=11)
    law = [*binom.pmf(np.arange(10), 30, event.sampling.rate), binom.sf(9, 30, event.sampling.rate)]
    assert (chisquare(counts, 1000 * np.array(law)).pvalue > 1e-4) == honest
    times = np.bincount(np.concatenate(trainer.seen) - 100, minlength=30) / 1000  # and each example as often
    assert np.abs(times - event.sampling.rate).max() < 5 * sqrt(event.sampling.rate / 1000)


def rotated(adapted: AdaptedModel, seed: int) -> tuple[Flat, dict[str, Flat]]:
    """The same adapter in another basis, (R·A, B·Rᵀ), and R of each B."""
    flat, random = adapted.read(), np.random.default_rng(seed)
    tensors = adapted.layout.split(flat)
    rotations: dict[str, Any] = {}
    for pair in adapted.layout.pairs:
        turn = np.linalg.qr(random.standard_normal((pair.rank, pair.rank)))[0].astype(np.float32)
        rotations[pair.b.name] = turn
        tensors[pair.a.name][...] = turn @ tensors[pair.a.name]
        tensors[pair.b.name][...] = tensors[pair.b.name] @ turn.T
    return flat, rotations


def turned(trained: AdapterLayout, flat: Floats, rotations: dict[str, Flat]) -> Floats:
    """A vector over B and the head, in the other basis."""
    own = trained.split(flat.astype(np.float32))
    return trained.join({n: x @ rotations[n].T if n in rotations else x for n, x in own.items()})


@pytest.mark.parametrize(("local", "invariant"), [(SGD, True), (ADAMW, False)])
def test_clipping_does_not_see_the_basis(local: Local, invariant: bool) -> None:
    """FedSVD turns the basis and `ffa` with an orthonormal A does not: clipped SGD goes the same way in both."""
    client = client_of("recipe.name=fedsvd", rank=4)
    adapted, examples, trained = client.adapted, client.sites.examples, client.shared.trained(1)
    random = np.random.default_rng(0)
    before = adapted.read()
    shifted = before + 0.1 * adapted.layout.pad(random.standard_normal(trained.size).astype(np.float32), trained)
    norms, changes = [], []
    try:
        adapted.write(shifted)
        other, rotations = rotated(adapted, 1)
        for start in (shifted, other):
            adapted.write(start)
            trainer = trainer_of(adapted, clip=0.5, local=local, trained=trained)
            norms.append(np.linalg.norm(gradients_of(trainer, examples, np.arange(10)), axis=1))
            changes.append(trainer.train(examples, [member_of(20, 6, 3)])[0].change)
    finally:
        adapted.write(before)
    assert norms[0].max() > 0.5  # something is clipped
    assert relative(norms[1], norms[0]) <= 1e-5
    difference = relative(changes[1], turned(trained, changes[0], rotations))
    assert difference <= 1e-4 if invariant else difference > 1e-2
    assert relative(changes[1], changes[0]) > 1e-2  # the basis is another one


# What the batched kernel does not know.


def bert_with(config: Any) -> AdaptedModel:
    torch.manual_seed(0)
    return adapt(get_peft_model(BertForSequenceClassification(BertConfig(**TEXT, num_labels=3)), config), CLASSIFY)


def hooks_of(adapted: AdaptedModel, examples: Examples) -> Hooked | None:
    return hooks_that_agree(adapted, list(adapted.parameter_names.values()), examples, np.arange(3))


def test_opacus_hooks_train_as_the_loop_does() -> None:
    adapted, examples = bert_with(LoraConfig(target_modules=["query"], bias="all")), examples_for("bert", 12, 0)
    hooks = hooks_of(adapted, examples)
    assert hooks is not None
    before, modes = adapted.read(), [m.training for m in adapted.model.modules()]
    changes = []
    mechanism = ExampleLevel(0.5, 0.0, 4, 12, adapted.layout.size)
    for own in (hooks, None):
        trainer = PrivateTrainer(
            adapted,
            Looped(adapted.model),
            adapted.layout,
            SGD,
            lambda _: mechanism,
            lambda member: SimulationRandomness(member.dropout_key),
            hooks=own,
        )
        changes.append(trainer.train(examples, [member_of(12, 4, 1)])[0].change)
        assert np.array_equal(adapted.read(), before)
    assert relative(changes[0], changes[1]) <= 1e-5
    assert [m.training for m in adapted.model.modules()] == modes
    assert all(p.requires_grad and p.grad is None for p in adapted.parameters.values())
    assert not any(m._forward_hooks or m._backward_hooks for m in adapted.model.modules())


def test_opacus_hooks_are_not_taken_where_they_overlook_a_tensor() -> None:
    adapted = bert_with(IA3Config(target_modules=["query"], feedforward_modules=[]))
    assert hooks_of(adapted, examples_for("bert", 3, 0)) is None


def test_hooks_train_the_asked_tensors_alone() -> None:
    adapted, examples = model_of("bert"), examples_for("bert", 5, 0)
    trained = trained_of(adapted, "B")
    values = values_of(adapted, trained)
    batch = adapted.batch(examples, [np.array([i]) for i in by_length(examples, np.arange(5))])
    found: Sequence[Tensor] = list(Hooked(adapted)(values, batch).values())
    flat = torch.cat([own.flatten(1) for own in found], 1).numpy()
    assert relative(flat, one_by_one("bert", adapted, trained, examples, np.arange(5))) <= 1e-5
