"""Per-example gradients by Opacus' hooks, for what the batched kernel does not know.

Opacus (Yousefpour et al., arXiv 2109.12298) keeps each module's input and multiplies it with the module's gradient.
It finds what ordinary modules hold (biases, norms, embeddings) and overlooks, without a word, tensors that peft keeps
beside them; so it is taken only where it gives what one example after another gives.
"""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..kernels.cohort import Looped, Stack
from ..protocols.keys import derive
from .adapted import AdaptedModel
from .tasks import Batch, Examples, Indices, member_losses


class Hooked:
    """Per-example gradients of a batch with one row an example. The model is as it was after each call.

    Raises RuntimeError where Opacus has no gradient for a tensor.
    """

    def __init__(self, adapted: AdaptedModel) -> None:
        self.adapted = adapted

    def __call__(self, values: Stack, batch: Batch) -> Stack:
        """Name ⇒ (K, *shape) for each tensor of `values`, a stack of one."""
        model, task = self.adapted.model, self.adapted.task
        with _with_values(model, values), _sampled(model):
            logits = model(**batch.inputs).logits
            losses = member_losses(
                task, logits.to(torch.promote_types(logits.dtype, torch.float32)), batch.labels, len(batch.shapes)
            )
            torch.autograd.backward(losses.sum())
            found = {name: getattr(model.get_parameter(name), "grad_sample", None) for name in values}
        return {name: _checked(name, gradient, values, len(batch.shapes)) for name, gradient in found.items()}


def hooks_that_agree(adapted: AdaptedModel, names: list[str], examples: Examples, rows: Indices) -> Hooked | None:
    """Opacus' hooks, if they give the loop's gradients of the parameters `names` on `rows`; None otherwise.

    They are compared a little beside the adapter in the model: at its start B is zero, and A's gradients are too.
    """
    batch = adapted.batch(examples, [rows[i : i + 1] for i in range(len(rows))])
    values = {name: _beside(adapted.model.get_parameter(name).detach(), name)[None] for name in names}
    stack = {name: one.expand(len(rows), *one.shape[1:]).requires_grad_() for name, one in values.items()}
    losses = member_losses(adapted.task, Looped(adapted.model)(stack, batch.inputs), batch.labels, len(rows))
    expected = torch.autograd.grad(losses.sum(), list(stack.values()), materialize_grads=True)
    hooks = Hooked(adapted)
    try:
        actual = hooks(values, batch)
    except (RuntimeError, ValueError, TypeError, AttributeError, NotImplementedError):
        return None
    tolerance = 5e-2 if torch.finfo(next(adapted.model.parameters()).dtype).bits < 32 else 1e-3
    agree = (_close(own, loop, tolerance) for own, loop in zip(actual.values(), expected, strict=True))
    return hooks if all(agree) else None


def _beside(value: Tensor, name: str) -> Tensor:
    generator = torch.Generator().manual_seed(derive(0, "probe", name) % 2**63)
    noise = torch.randn(value.shape, generator=generator, dtype=torch.float32)
    return value + 0.02 * noise.to(value.device, value.dtype)


def _checked(name: str, gradient: object, values: Stack, count: int) -> Tensor:
    if not isinstance(gradient, Tensor) or gradient.shape != (count, *values[name].shape[1:]):
        raise RuntimeError(f"Opacus has no per-example gradient of {name}")
    return gradient


@contextmanager
def _with_values(model: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """The model with these values in it, and nothing else to train."""
    own = {name: p for name, p in model.named_parameters() if p.requires_grad}
    kept = {name: own[name].detach().clone() for name in values}
    try:
        with torch.no_grad():
            for name, one in values.items():
                own[name].copy_(one[0])
        for name, parameter in own.items():
            parameter.requires_grad_(name in values)
        yield
    finally:
        with torch.no_grad():
            for name, before in kept.items():
                own[name].copy_(before)
        for parameter in own.values():
            parameter.requires_grad_(True)
            parameter.grad = None


@contextmanager
def _sampled(model: nn.Module) -> Iterator[None]:
    """The model with Opacus' hooks on whatever trains, which is in training mode: Opacus asks for it, dropout must not."""
    from opacus import GradSampleModule

    trains = [m for m in model.modules() if any(p.requires_grad for p in m.parameters(recurse=False))]
    hooked = GradSampleModule(model, loss_reduction="sum")
    for module in trains:
        module.training = True
    try:
        with warnings.catch_warnings():
            # Nothing below the first trained module has a gradient, which is how it should be.
            warnings.filterwarnings("ignore", message="Full backward hook is firing")
            yield
    finally:
        hooked.to_standard_module()
        for module in trains:
            module.training = False


def _close(x: Tensor, y: Tensor, tolerance: float) -> bool:
    return bool((x - y).norm() <= tolerance * y.norm() + 1e-6)
