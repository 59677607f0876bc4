"""First-order local training of a cohort: SGD or AdamW on stacked adapters, ragged data included.

An elementwise optimizer steps a stack exactly as it steps each member alone. A member with fewer steps than others
leaves the stack when it is done, so no later step, momentum or weight decay can touch it: members are ordered by
their steps, and the stack is cut from its end.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..kernels.cohort import Dropout, Forward, Looped, Stack, members
from ..protocols.keys import derive
from ..protocols.layout import AdapterLayout, Flat
from ..protocols.spec import Local
from .adapted import AdaptedModel
from .tasks import Examples, Indices, member_losses

COHORT_TOKENS = 4096
"""Rows × length of one step of a chunk: enough to amortize Python and small kernels, small enough for the caches."""


@dataclass(frozen=True)
class Member:
    """One client's share of a round: its `batches` are indices into the common examples, one array a step.

    `dropout_key` keys its adapter dropout.
    """

    batches: Sequence[Indices]
    dropout_key: int


@dataclass(frozen=True)
class Trained:
    """One member after training: `change` is trained − start (over the trained layout; float64 if the adapter is)."""

    change: Flat
    losses: np.ndarray[Any, np.dtype[np.float32]]


@dataclass(frozen=True)
class Trainer:
    """Trains any number of members that start from the adapter which is in the model."""

    adapted: AdaptedModel
    forward: Forward
    trained: AdapterLayout
    local: Local

    def train(self, examples: Examples, cohort: Sequence[Member]) -> list[Trained]:
        """One Trained a member, in the order given. Chunks bound the memory; they do not change the numbers."""
        results: dict[int, Trained] = {}
        for chunk in self._chunks(examples, cohort):
            for position, trained in zip(chunk, self._train(examples, [cohort[i] for i in chunk]), strict=True):
                results[position] = trained
        return [results[position] for position in range(len(cohort))]

    def _chunks(self, examples: Examples, cohort: Sequence[Member]) -> list[list[int]]:
        """Members in order of falling steps, as many in a chunk as keep one step within COHORT_TOKENS."""
        if isinstance(self.forward, Looped):
            return [[position] for position in range(len(cohort))]
        chunks: list[list[int]] = []
        rows = length = 0
        for position in sorted(range(len(cohort)), key=lambda i: -len(cohort[i].batches)):
            own_rows = max(len(b) for b in cohort[position].batches)
            own_length = max(int(examples.lengths[b].max()) for b in cohort[position].batches)
            rows, length = max(rows, own_rows), max(length, own_length)
            if chunks and (len(chunks[-1]) + 1) * rows * length <= COHORT_TOKENS:
                chunks[-1].append(position)
            else:
                chunks.append([position])
                rows, length = own_rows, own_length
        return chunks

    def _train(self, examples: Examples, cohort: Sequence[Member]) -> list[Trained]:
        """Members in order of falling steps, together."""
        start = {n: self.adapted.parameters[n].detach() for n in (t.name for t in self.trained.tensors)}
        stack = {
            self.adapted.parameter_names[name]: value.expand(len(cohort), *value.shape).clone().requires_grad_()
            for name, value in start.items()
        }
        optimizer = _optimizer(list(stack.values()), self.local)
        # What is trained is fp32, but for somebody's own model in float64.
        dtype = torch.promote_types(next(iter(start.values())).dtype, torch.float32)
        changes = torch.empty((len(cohort), self.trained.size), dtype=dtype)
        losses: list[list[Tensor]] = [[] for _ in cohort]
        for step in range(len(cohort[0].batches)):
            active = sum(len(member.batches) > step for member in cohort)
            if active < members(stack):
                self._store(stack, start, changes, active)
                _shrink(stack, optimizer, active)
            for member, loss in enumerate(self._step(examples, cohort[:active], step, stack, optimizer)):
                losses[member].append(loss)
        self._store(stack, start, changes, 0)
        return [
            Trained(change.numpy(), torch.stack(own).cpu().numpy()) for change, own in zip(changes, losses, strict=True)
        ]

    def _step(
        self,
        examples: Examples,
        cohort: Sequence[Member],
        step: int,
        stack: Stack,
        optimizer: torch.optim.Optimizer,
    ) -> Tensor:
        """One optimizer step of every active member; their losses before it, (C,)."""
        batch = self.adapted.task.collate(examples, [member.batches[step] for member in cohort])
        device = self.adapted.device
        inputs = {key: value.to(device) for key, value in batch.inputs.items()}
        dropout = self._dropout(cohort, step, batch.shapes)
        losses = member_losses(
            self.adapted.task, self.forward(stack, inputs, dropout), batch.labels.to(device), len(cohort)
        )
        optimizer.zero_grad()
        torch.autograd.backward(losses.sum())
        optimizer.step()
        return losses.detach()

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

    def _store(self, stack: Stack, start: Stack, changes: Tensor, first: int) -> None:
        """Write trained − start of the members from `first` on."""
        for tensor in self.trained.tensors:
            values = stack[self.adapted.parameter_names[tensor.name]].detach()[first:]
            difference = (values - start[tensor.name]).reshape(len(values), -1)
            offset = self.trained.offsets[tensor.name]
            last = first + len(values)
            changes[first:last, offset : offset + tensor.size] = difference


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
