"""Rounds that are cut off, and bases that barely fit: other ways to the same numbers."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedapt.client.adapted import AdaptedModel
from fedapt.client.batches import plan_batches
from fedapt.client.checkpointed import checkpoint_blocks
from fedapt.client.halfway import Halfway, Point
from fedapt.client.models import load_model
from fedapt.client.stopped import StoppedWork
from fedapt.client.trainer import Member, Trained, Trainer
from fedapt.kernels.blocks import stacked_blocks
from fedapt.kernels.cohort import Batched, Forward, Looped

from .clients import client_of, model_of, sites_of
from .residents import spec_of

SITES = sites_of({1: 9})


def trainer_of(optimizer: str, adapted: AdaptedModel | None = None, make: Callable[..., Forward] = Batched) -> Trainer:
    adapted = adapted or model_of()
    names = [adapted.parameter_names[t.name] for t in adapted.layout.tensors]
    forward = make(adapted.model, names) if make is Batched else make(adapted.model)
    local = client_of(f"local.optimizer={optimizer}", "local.steps=5").spec.local
    return Trainer(adapted, forward, adapted.layout, local)


def member_of(trainer: Trainer, round_: int = 1) -> Member:
    own = SITES.indices[1]
    return Member([own[b] for b in plan_batches(SITES.examples.lengths[own], trainer.local, 0, round_, 1)], 3)


class Cut(Halfway):
    """Stops after so many steps."""

    left = 0

    def reached(self, key: bytes, point: Callable[[], object]) -> None:
        self.left -= 1
        if self.left == 0:
            self.stop()
        super().reached(key, point)  # type: ignore[arg-type]


def same(one: Trained, two: Trained) -> bool:
    return one.change.tobytes() == two.change.tobytes() and one.losses.tobytes() == two.losses.tobytes()


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_what_was_cut_off_goes_on_to_the_same_bytes(tmp_path: Path, optimizer: str, steps: int) -> None:
    trainer = trainer_of(optimizer)
    member = member_of(trainer)
    (expected,) = trainer.train(SITES.examples, [member])
    cut = Cut(tmp_path / "h.safetensors", seconds=1e9)
    cut.left = steps
    cut.begin(b"work")
    with pytest.raises(StoppedWork):
        replace(trainer, halfway=cut).train(SITES.examples, [member])
    seen: list[int] = []
    on = Halfway(cut.path, seconds=1e9)
    on.begin(b"work")
    original = on.reached
    on.reached = lambda key, point: (seen.append(1), original(key, point))[1]  # type: ignore[method-assign, func-returns-value]
    (actual,) = replace(trainer, halfway=on).train(SITES.examples, [member])
    assert same(actual, expected)
    assert len(seen) == len(member.batches) - steps


def test_another_work_or_member_starts_anew(tmp_path: Path) -> None:
    """And so does one whose file the disk has damaged."""
    trainer = trainer_of("adamw")
    member, other = member_of(trainer), member_of(trainer, round_=2)
    (expected,) = trainer.train(SITES.examples, [other])
    kept = Halfway(tmp_path / "h.safetensors", seconds=0)
    kept.begin(b"work")
    (first,) = replace(trainer, halfway=kept).train(SITES.examples, [member])
    assert not same(first, expected)
    (actual,) = replace(trainer, halfway=kept).train(SITES.examples, [other])
    assert same(actual, expected)
    kept.begin(b"other work")
    assert kept.found(b"") is None
    kept.path.write_bytes(kept.path.read_bytes()[:100])
    (again,) = replace(trainer, halfway=kept).train(SITES.examples, [other])
    assert same(again, expected)


def test_a_disk_that_is_full_costs_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One, whatever number of tries; and the next one that succeeds is there."""
    trainer = trainer_of("sgd")
    member = member_of(trainer)
    (expected,) = trainer.train(SITES.examples, [member])
    kept = Halfway(tmp_path / "full" / "h.safetensors", seconds=0)
    kept.begin(b"work")
    (actual,) = replace(trainer, halfway=kept).train(SITES.examples, [member])
    assert same(actual, expected)
    (said,) = [record.getMessage() for record in caplog.records]
    assert "cannot be kept" in said
    (tmp_path / "full").mkdir()
    replace(trainer, halfway=kept).train(SITES.examples, [member])
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["h.safetensors"]


def test_what_a_full_disk_took_of_it_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Halfway(tmp_path / "h.safetensors", seconds=0)
    kept.begin(b"work")

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fedapt.client.halfway.os.fsync", full)
    kept.stop()
    with pytest.raises(StoppedWork):  # it ends as it was told to, with what was kept before
        kept.reached(b"", lambda: Point(1, {}, {}, torch.zeros(1)))
    assert list(tmp_path.iterdir()) == []


def test_it_is_written_as_often_as_asked(tmp_path: Path) -> None:
    now = [0.0]
    kept = Halfway(tmp_path / "h.safetensors", seconds=10, clock=lambda: now[0])
    kept.begin(b"work")

    def point() -> object:
        raise AssertionError("not yet")

    now[0] = 9.9
    kept.reached(b"", point)  # type: ignore[arg-type]
    now[0] = 10.0
    with pytest.raises(AssertionError):
        kept.reached(b"", point)  # type: ignore[arg-type]


@given(micro=st.integers(1, 5), optimizer=st.sampled_from(["sgd", "adamw"]))
def test_micro_batches_are_the_batch(micro: int, optimizer: str) -> None:
    trainer = trainer_of(optimizer)
    member = member_of(trainer)
    (expected,) = trainer.train(SITES.examples, [member])
    (actual,) = replace(trainer, micro_batch=micro).train(SITES.examples, [member])
    np.testing.assert_allclose(actual.losses, expected.losses, rtol=1e-5)
    tolerance = 1e-5 if optimizer == "sgd" else 1e-2
    assert np.linalg.norm(actual.change - expected.change) <= tolerance * np.linalg.norm(expected.change)


@pytest.mark.parametrize("make", [Batched, Looped])
@pytest.mark.parametrize("base", ["bert", "llama"])
def test_checkpointed_blocks_give_the_same_bytes_and_run_twice(
    base: str, make: Callable[..., Forward], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second run must see the members' own tensors, and not those that the model has by then."""
    adapted = copy.deepcopy(model_of()) if base == "bert" else load_model(spec_of())
    inputs = {"input_ids": torch.arange(1, 25).view(6, 4), "attention_mask": torch.ones(6, 4, dtype=torch.long)}
    names = [name for name, p in adapted.model.named_parameters() if p.requires_grad]
    generator = torch.Generator().manual_seed(1)
    stack = {}
    for name in names:
        value = adapted.model.get_parameter(name).detach()
        stack[name] = (value + 0.1 * torch.randn((3, *value.shape), generator=generator)).requires_grad_()

    def gradients() -> list[torch.Tensor]:
        forward = make(adapted.model, names) if make is Batched else make(adapted.model)
        logits = forward(stack, inputs)
        weights = torch.linspace(-1, 1, logits.numel()).view_as(logits)
        return [logits.detach(), *torch.autograd.grad((logits * weights).sum(), list(stack.values()))]

    expected = gradients()
    block, runs = stacked_blocks(adapted.model)[0], list[bool]()
    original = type(block).forward

    def counted(self: torch.nn.Module, *args: object, **kwargs: object) -> object:
        runs.append(self is block)
        return original(self, *args, **kwargs)

    assert checkpoint_blocks(adapted.model) > 0
    monkeypatch.setattr(type(block), "forward", counted)
    actual = gradients()
    assert all(torch.equal(one, two) for one, two in zip(actual, expected, strict=True))
    assert sum(runs) == (2 if make is Batched else 6)
