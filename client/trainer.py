"""First-order local training of a cohort: SGD or AdamW on stacked adapters, ragged data included.

An elementwise optimizer steps a stack exactly as it steps each member alone. A member with fewer steps than others
leaves the stack when it is done, so no later step, momentum or weight decay can touch it: members are ordered by
their steps, and the stack is cut from its end.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..kernels.cohort import Dropout, Forward, Looped, Stack, members
from ..protocols.keys import derive
from ..protocols.layout import AdapterLayout, Flat
from ..protocols.spec import Local
from .adapted import AdaptedModel
from .chunks import chunk_tokens
from .halfway import Halfway, Point, state_of
from .tasks import Examples, Indices, member_losses

Losses = np.ndarray[Any, np.dtype[np.float32]]
"""A member's loss before each of its steps, (steps,)."""


@dataclass(frozen=True)
class Moments:
    """AdamW's state of one member after `steps` steps: the two moments, fp32 over the trained layout."""

    first: Flat
    second: Flat
    steps: int = 0


@dataclass(frozen=True)
class Member:
    """One client's share of a round: its `batches` are indices into the common examples, one array a step.

    `dropout_key` keys its adapter dropout. `start` (over the trained layout) is where it starts; None: from the adapter
    in the model. `moments` are AdamW's of its steps before; None: it starts anew, and its moments are not kept.
    """

    batches: Sequence[Indices]
    dropout_key: int
    start: Flat | None = None
    moments: Moments | None = None


@dataclass(frozen=True)
class Trained:
    """One member after training: `change` is trained − start (over the trained layout; float64 if the adapter is).

    `moments` are kept where the member came with some.
    """

    change: Flat
    losses: Losses
    moments: Moments | None = None


@dataclass
class _Running:
    """A chunk in training: its members, where they start (C, trained.size), what of them still trains, and losses."""

    cohort: Sequence[Member]
    start: Tensor
    stack: Stack
    optimizer: torch.optim.Optimizer
    losses: list[list[Tensor]]


@dataclass(frozen=True)
class Trainer:
    """Trains any number of members, together, over the model's frozen base.

    A cohort of one can be kept `halfway`, and can run `micro_batch` of its batch's examples at once: a step is the same up
    to rounding, and takes that much less memory.
    """

    adapted: AdaptedModel
    forward: Forward
    trained: AdapterLayout
    local: Local
    halfway: Halfway | None = field(default=None, kw_only=True)
    micro_batch: int | None = field(default=None, kw_only=True)

    def train(self, examples: Examples, cohort: Sequence[Member]) -> list[Trained]:
        """One Trained a member, in the order given. Chunks bound the memory; they do not change the numbers."""
        if cohort:
            self.adapted.prepare(examples, np.concatenate([np.concatenate(member.batches) for member in cohort]))
        results: dict[int, Trained] = {}
        for chunk in self._chunks(examples, cohort):
            for position, trained in zip(chunk, self._train(examples, [cohort[i] for i in chunk]), strict=True):
                results[position] = trained
        return [results[position] for position in range(len(cohort))]

    def _chunks(self, examples: Examples, cohort: Sequence[Member]) -> list[list[int]]:
        """Members in order of falling steps, as many in a chunk as keep one step within `chunk_tokens`.

        AdamW corrects its moments by the number of steps, which is one number for a stack: others do not join it.
        """
        if isinstance(self.forward, Looped):
            return [[position] for position in range(len(cohort))]
        chunks: list[list[int]] = []
        rows = length = 0
        most = chunk_tokens(self.adapted.model)
        for position in sorted(range(len(cohort)), key=lambda i: (_before(cohort[i]), -len(cohort[i].batches))):
            own_rows = max(len(b) for b in cohort[position].batches)
            own_length = max(int(examples.lengths[b].max()) for b in cohort[position].batches)
            rows, length = max(rows, own_rows), max(length, own_length)
            fits = chunks and (len(chunks[-1]) + 1) * rows * length <= most
            if fits and _before(cohort[chunks[-1][0]]) == _before(cohort[position]):
                chunks[-1].append(position)
            else:
                chunks.append([position])
                rows, length = own_rows, own_length
        return chunks

    def _train(self, examples: Examples, cohort: Sequence[Member]) -> list[Trained]:
        """Members in order of falling steps, together."""
        start = self._start(cohort)
        stack = self._spread(start)
        running = _Running(cohort, start, stack, _optimizer(list(stack.values()), self.local), [[] for _ in cohort])
        self._resume(running)
        kept = self.halfway if len(cohort) == 1 else None
        key = _key(cohort[0], self.trained)
        done: list[Trained] = []
        for step in range(self._go_on(running, None if kept is None else kept.found(key)), len(cohort[0].batches)):
            active = sum(len(member.batches) > step for member in cohort)
            if active < members(stack):
                done = self._results(running, active) + done
                _shrink(stack, running.optimizer, active)
            for member, loss in enumerate(self._step(examples, running, step)):
                running.losses[member].append(loss)
            if kept is not None:
                kept.reached(key, lambda: _point(running))
        return self._results(running, 0) + done

    def _start(self, cohort: Sequence[Member]) -> Tensor:
        """Where each member starts, (C, trained.size), fp32 (float64 if the adapter is)."""
        own = [member.start for member in cohort if member.start is not None]
        if own:
            return torch.from_numpy(np.stack(own)).to(self.adapted.device)
        parts = [self.adapted.parameters[t.name].detach().flatten() for t in self.trained.tensors]
        dtype = torch.promote_types(parts[0].dtype, torch.float32)
        return torch.cat([part.to(dtype) for part in parts]).expand(len(cohort), -1)

    def _spread(self, rows: Tensor) -> Stack:
        """(C, trained.size) as a stack of trainable tensors of their own."""
        stack = {}
        for tensor in self.trained.tensors:
            name, first = self.adapted.parameter_names[tensor.name], self.trained.offsets[tensor.name]
            values = rows[:, first : first + tensor.size].reshape(-1, *tensor.shape)
            stack[name] = values.to(self.adapted.parameters[tensor.name].dtype, copy=True).requires_grad_()
        return stack

    def _gathered(self, stack: Stack, first: int) -> Tensor:
        """The inverse of `_spread`, of the members from `first` on."""
        names = [self.adapted.parameter_names[tensor.name] for tensor in self.trained.tensors]
        return torch.cat([stack[name].detach()[first:].flatten(1) for name in names], 1)

    def _resume(self, running: _Running) -> None:
        """Give AdamW the moments of the members that come with some: all of a chunk, or none."""
        kept = [member.moments for member in running.cohort if member.moments is not None]
        if not kept or not isinstance(running.optimizer, torch.optim.AdamW):
            return
        firsts, seconds = (
            self._spread(torch.from_numpy(np.stack(moments)).to(self.adapted.device))
            for moments in ([m.first for m in kept], [m.second for m in kept])
        )
        for name, parameter in running.stack.items():
            running.optimizer.state[parameter] = {
                "step": torch.tensor(float(kept[0].steps)),
                "exp_avg": firsts[name].detach(),
                "exp_avg_sq": seconds[name].detach(),
            }

    def _go_on(self, running: _Running, point: Point | None) -> int:
        """Put a member where a kept Point has it; how many of its steps are done."""
        if point is None:
            return 0
        for name, parameter in running.stack.items():
            parameter.data.copy_(point.values[name])
            state = {k: v if v.dim() == 0 else v.to(parameter.device) for k, v in point.states[name].items()}
            if state:
                running.optimizer.state[parameter] = state
        running.losses[0].extend(point.losses.to(self.adapted.device).unbind())
        return point.steps

    def _results(self, running: _Running, first: int) -> list[Trained]:
        """What the members of the stack from `first` on have come to."""
        last = members(running.stack)
        change = (self._gathered(running.stack, first) - running.start[first:last]).cpu().numpy()
        losses = [torch.stack(own).cpu().numpy() for own in running.losses[first:last]]
        moments = [
            member.moments and Moments(mean, square, member.moments.steps + len(own))
            for member, own, mean, square in zip(
                running.cohort[first:last], losses, *self._moments(running, first), strict=True
            )
        ]
        return [Trained(*parts) for parts in zip(change, losses, moments, strict=True)]

    def _moments(self, running: _Running, first: int) -> list[Any]:
        """AdamW's two moments of the members from `first` on, each (members, trained.size); empty rows under SGD."""
        if not isinstance(running.optimizer, torch.optim.AdamW):
            return [np.empty((members(running.stack) - first, 0), np.float32)] * 2
        states = {name: running.optimizer.state[parameter] for name, parameter in running.stack.items()}
        return [
            self._gathered({name: state[key] for name, state in states.items()}, first).cpu().numpy()
            for key in ("exp_avg", "exp_avg_sq")
        ]

    def _step(self, examples: Examples, running: _Running, step: int) -> Tensor:
        """One optimizer step of every active member; their losses before it, (C,)."""
        cohort = running.cohort[: members(running.stack)]
        if self.micro_batch is not None and len(cohort) == 1:
            return self._accumulated(examples, running, cohort[0].batches[step])
        batch = self.adapted.batch(examples, [member.batches[step] for member in cohort])
        dropout = self._dropout(cohort, step, batch.shapes)
        logits = self.forward(running.stack, batch.inputs, dropout)
        losses = member_losses(self.adapted.task, logits, batch.labels, len(cohort))
        running.optimizer.zero_grad()
        torch.autograd.backward(losses.sum())
        running.optimizer.step()
        return losses.detach()

    def _accumulated(self, examples: Examples, running: _Running, rows: Indices) -> Tensor:
        """`_step` of one member, some rows at a time. The loss is the mean over the targets of all rows, as it is there.

        Without adapter dropout: its masks are drawn for a whole batch.
        """
        assert self.micro_batch is not None
        parameters = list(running.stack.values())
        loss, counted = torch.zeros(1, device=self.adapted.device), torch.zeros(1, device=self.adapted.device)
        running.optimizer.zero_grad()
        for first in range(0, len(rows), self.micro_batch):
            batch = self.adapted.batch(examples, [rows[first : first + self.micro_batch]])
            sums, targets, _ = self.adapted.task.losses(self.forward(running.stack, batch.inputs), batch.labels)
            torch.autograd.backward(sums.sum())
            loss, counted = loss + sums.detach().sum(), counted + targets.sum()
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad /= counted.clamp(min=1).to(parameter.grad.dtype)
        running.optimizer.step()
        return loss / counted.clamp(min=1)

    def _dropout(self, cohort: Sequence[Member], step: int, shapes: Sequence[tuple[int, int]]) -> Dropout | None:
        """Masks keyed by client, step and module, drawn in the member's own shape: padding cannot change them."""
        config = self.adapted.model.peft_config[self.adapted.model.active_adapter]
        rate = float(getattr(config, "lora_dropout", 0.0))
        if rate == 0.0:
            return None
        longest = max(rows for rows, _ in shapes), max(length for _, length in shapes)

        def drop(module: str, member: int, x: Tensor) -> Tensor:
            generator = torch.Generator().manual_seed(derive(cohort[member].dropout_key, module, step) % 2**63)
            per_token = x.shape[0] == longest[0] * longest[1]
            rows, length = shapes[member] if per_token else (x.shape[0], 1)
            kept = torch.rand((rows, length, x.shape[1]), generator=generator) >= rate
            mask = torch.zeros((longest if per_token else (rows, 1)) + (x.shape[1],), dtype=torch.bool)
            mask[:rows, :length] = kept
            return x * mask.view_as(x).to(x.device) / (1 - rate)

        return drop


def _key(member: Member, trained: AdapterLayout) -> bytes:
    """Which training it is: what a member learns from, in which order, from where."""
    digest = sha256(f"{member.dropout_key}|{trained.digest}|{_before(member)}".encode())
    for part in (*member.batches, member.start):
        digest.update(b"" if part is None else np.ascontiguousarray(part).tobytes() + b"|")
    return digest.digest()


def _point(running: _Running) -> Point:
    """Where a cohort of one stands between two steps."""
    states = {name: state_of(running.optimizer, parameter) for name, parameter in running.stack.items()}
    values = {name: parameter.detach() for name, parameter in running.stack.items()}
    return Point(len(running.losses[0]), values, states, torch.stack(running.losses[0]))


def _before(member: Member) -> int:
    """The steps that a member's moments stand for."""
    return -1 if member.moments is None else member.moments.steps


def _optimizer(parameters: list[Tensor], local: Local) -> torch.optim.Optimizer:
    if local.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=local.learning_rate, weight_decay=local.weight_decay, foreach=True)
    return torch.optim.AdamW(parameters, lr=local.learning_rate, weight_decay=local.weight_decay, foreach=True)


def _shrink(stack: Stack, optimizer: torch.optim.Optimizer, active: int) -> None:
    """Keep the first `active` members of the stack and of the optimizer's state."""
    for parameter in stack.values():
        parameter.data = parameter.data[:active].clone()
        parameter.grad = None
        state = optimizer.state.get(parameter, {})
        for key, value in state.items():
            if isinstance(value, Tensor) and value.dim() > 0:
                state[key] = value[:active].clone()
