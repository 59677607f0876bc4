"""The cohort: C adapters over one frozen base, in one forward and one backward.

Trainable tensors get a leading axis C; the rows of a batch are member-major, so rows `m·b … (m+1)·b − 1` belong to
member m. The base runs once over all C·b rows, the factors as batched matmuls. The sum of the members' losses gives
each member its own gradient, because no member's output depends on another's tensors.

Four forwards with one signature; each is slower than the one before, and none gives different numbers:

    Packed     `Batched`, without what padding costs
    Batched    `bmm` over stacked LoRA factors and stacked heads (nn.Linear)
    Vmapped    `torch.vmap` over `functional_call`: any adapter whose forward vmap can trace
    Looped     one member after another: the plain reference
"""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn
from torch.func import functional_call

from .packing import PackedBlocks, Packing, packed_inputs
from .ragged import add_products

Stack = dict[str, Tensor]
"""Parameter name ⇒ tensor (C, *shape) of every member's own values."""

Inputs = Mapping[str, Tensor]
"""Keyword arguments of the model; each tensor is (C·b, …), member-major."""

Dropout = Callable[[str, int, Tensor], Tensor]
"""(name of the LoRA module, member, that member's input (rows, in)) ⇒ the input with the member's own mask applied."""


class NotBatchableError(Exception):
    """The batched kernel does not know this trainable tensor; a fallback does."""


class Forward(Protocol):
    """A forward of the whole cohort."""

    def __call__(self, stack: Stack, inputs: Inputs, dropout: Dropout | None = None) -> Tensor:
        """Logits (C·b, …), member-major, fp32 (float64 over a float64 model)."""


def members(stack: Stack) -> int:
    """C, the number of members in a stack."""
    return next(iter(stack.values())).shape[0]


class Packed:
    """`Batched`, its blocks run over the tokens that are there. A batch without padding is `Batched`'s own, and so is one
    with adapter dropout, whose masks are drawn in padded shapes.

    Raises NotBatchableError and ValueError where the tensors or the model's attention are not known.
    """

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        self.batched, self.blocks = Batched(model, names), PackedBlocks(model)
        if any(head in self.blocks for head in self.batched.heads.values()):
            raise NotBatchableError("a stacked layer inside the blocks has as many rows of each member")

    def __call__(self, stack: Stack, inputs: Inputs, dropout: Dropout | None = None) -> Tensor:
        mask = inputs.get("attention_mask")
        if mask is None or dropout is not None or bool(mask.all()):
            return self.batched(stack, inputs, dropout)
        packing = Packing(mask, members(stack))
        with self.blocks.packed(packing):
            return self.batched(stack, packed_inputs(inputs, packing), None, packing.sizes)


class Batched:
    """LoRA factors on linear layers as batched matmuls, heads likewise.

    Raises NotBatchableError when a tensor of `names` (parameter names of `model`) is neither a factor of a plain
    `peft` LoRA layer nor the weight or bias of an `nn.Linear`.
    """

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        self.model = model
        self.lora: dict[str, LoraLinear] = {}
        self.heads: dict[str, nn.Linear] = {}
        for name in names:
            layer_name, factor, _ = name.partition(".lora_")
            layer = model.get_submodule(layer_name if factor else name.rpartition(".")[0])
            if factor and _is_plain(layer, name):
                self.lora[layer_name] = layer
            elif not factor and type(layer) is nn.Linear:
                self.heads[name.rpartition(".")[0]] = layer
            else:
                raise NotBatchableError(f"{name}: {type(layer).__name__}")

    def __call__(
        self, stack: Stack, inputs: Inputs, dropout: Dropout | None = None, sizes: Sequence[int] = ()
    ) -> Tensor:
        """`sizes` are the members' tokens where the blocks run over packed rows."""
        with self._patched(stack, dropout, sizes):
            return _wide(self.model(**inputs).logits)

    @contextmanager
    def _patched(self, stack: Stack, dropout: Dropout | None, sizes: Sequence[int]) -> Iterator[None]:
        """The model with the stacked forwards in place of the modules' own."""
        for name, layer in self.lora.items():
            layer.forward = _lora_forward(name, layer, stack, dropout, sizes)
        for name, head in self.heads.items():
            head.forward = _head_forward(name, head, stack)  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            for module in (*self.lora.values(), *self.heads.values()):
                del module.forward


class Vmapped:
    """Any adapter that `torch.vmap` can trace. With adapter dropout it is the loop: masks are drawn by member."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, stack: Stack, inputs: Inputs, dropout: Dropout | None = None) -> Tensor:
        if dropout is not None:
            return Looped(self.model)(stack, inputs, dropout)
        count = members(stack)
        frozen = _untrained(self.model, stack)

        def one(values: dict[str, Tensor], rows: dict[str, Tensor]) -> Tensor:
            logits: Tensor = functional_call(self.model, {**frozen, **values}, (), rows).logits
            return logits

        per_member = {key: value.view(count, -1, *value.shape[1:]) for key, value in inputs.items()}
        with warnings.catch_warnings():
            # Some operations have no rule for vmap, which then loops over them alone: slower, and right.
            warnings.filterwarnings("ignore", message="There is a performance drop")
            logits: Tensor = torch.vmap(one)(stack, per_member)
        return _wide(logits.flatten(0, 1))


class Looped:
    """Each member by itself, through the stock modules: the reference of the other two."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.lora = {n: m for n, m in model.named_modules() if isinstance(m, LoraLayer)}

    def __call__(self, stack: Stack, inputs: Inputs, dropout: Dropout | None = None) -> Tensor:
        count = members(stack)
        frozen = _untrained(self.model, stack)
        logits = []
        for member in range(count):
            values = {**frozen, **{name: tensor[member] for name, tensor in stack.items()}}
            rows = {key: value.view(count, -1, *value.shape[1:])[member] for key, value in inputs.items()}
            with self._dropped(member, dropout):
                logits.append(functional_call(self.model, values, (), rows).logits)
        return _wide(torch.cat(logits))

    @contextmanager
    def _dropped(self, member: int, dropout: Dropout | None) -> Iterator[None]:
        """The stock modules, their dropout replaced by this member's keyed masks."""
        if dropout is None:
            yield
            return
        stock = [(layer, dict(layer.lora_dropout)) for layer in self.lora.values()]
        for name, layer in self.lora.items():
            for adapter in layer.active_adapters[:1]:  # frozen factors have no dropout
                layer.lora_dropout[adapter] = _MemberDropout(name, member, dropout)
        try:
            yield
        finally:
            for layer, own in stock:
                layer.lora_dropout.update(own)


class _MemberDropout(nn.Module):
    """One member's keyed mask as the module that stock peft calls."""

    def __init__(self, name: str, member: int, dropout: Dropout) -> None:
        super().__init__()
        self.name, self.member, self.dropout = name, member, dropout

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.name, self.member, x.reshape(-1, x.shape[-1])).view_as(x)


def fastest(model: nn.Module, names: list[str], inputs: Inputs) -> Forward:
    """The fastest forward that gives the loop's logits and gradients on `inputs` (two members; rows of real data).

    Trying is the only honest test: a model may reorder its rows inside, and then no rule about its layers helps. The last
    row is cut short, so that what happens to padding is tried too.
    """
    stack, inputs = _probe_stack(model, names), _cut(inputs)
    tolerance = tolerance_of(next(model.parameters()).dtype)
    reference = _logits_and_gradients(Looped(model), stack, inputs)
    for make in (lambda: Packed(model, names), lambda: Batched(model, names), lambda: Vmapped(model)):
        try:
            candidate: Forward = make()
            result = _logits_and_gradients(candidate, stack, inputs)
        except (NotBatchableError, RuntimeError, ValueError, TypeError, AttributeError, IndexError):
            continue
        if all(close(x, y, tolerance) for x, y in zip(result, reference, strict=True)):
            return candidate
    return Looped(model)


def _lora_forward(
    name: str, layer: LoraLinear, stack: Stack, dropout: Dropout | None, sizes: Sequence[int]
) -> Callable[..., Tensor]:
    adapter = layer.active_adapters[0]
    a = stack.get(
        f"{name}.lora_A.{adapter}.weight", layer.lora_A[adapter].weight.detach()
    )  # (C, r, in), or shared (r, in)
    b = stack.get(
        f"{name}.lora_B.{adapter}.weight", layer.lora_B[adapter].weight.detach()
    )  # (C, out, r), or shared (out, r)
    count, scaling, tokens = members(stack), float(layer.scaling[adapter]), sum(sizes)
    shared = [
        (layer.lora_A[other].weight, layer.lora_B[other].weight, float(layer.scaling[other]))
        for other in layer.active_adapters[1:]
    ]  # (R, in), (out, R): frozen, the same for all members

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        base: Tensor = layer.base_layer(x, *args, **kwargs)
        sums = base.to(b.dtype)
        for frozen_a, frozen_b, factor in shared:
            sums = sums + factor * (x.to(frozen_a.dtype) @ frozen_a.mT @ frozen_b.mT)
        if x.shape[:-1] == (1, tokens):
            sums = add_products(sums[0], x[0].to(a.dtype), a, scaling * b, sizes)
            return sums.view_as(base).to(base.dtype)
        rows = x.to(a.dtype).reshape(count, -1, x.shape[-1])
        if dropout is not None:
            rows = torch.stack([dropout(name, member, rows[member]) for member in range(count)])
        inner = torch.matmul(rows, a.mT)  # (C, rows, r)
        outer = b.mT.expand(count, -1, -1)
        sums = torch.baddbmm(sums.view(count, -1, base.shape[-1]), inner, outer, alpha=scaling)
        return sums.view_as(base).to(base.dtype)

    return forward


def _head_forward(name: str, head: nn.Linear, stack: Stack) -> Callable[[Tensor], Tensor]:
    weight = stack.get(f"{name}.weight", head.weight.detach())  # (C, out, in), or shared (out, in)
    own_bias = None if head.bias is None else head.bias.detach()
    bias = stack.get(f"{name}.bias", own_bias)  # (C, out), or shared (out,)
    count = members(stack)

    def forward(x: Tensor) -> Tensor:
        rows = x.to(weight.dtype).reshape(count, -1, x.shape[-1])
        result = torch.matmul(rows, weight.mT)
        if bias is not None:
            result = result + (bias.unsqueeze(1) if bias.dim() == 2 else bias)
        return result.view(*x.shape[:-1], -1)

    return forward


def _wide(logits: Tensor) -> Tensor:
    """Half precisions as fp32, because a loss needs more; wider ones as they are."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _untrained(model: nn.Module, stack: Stack) -> dict[str, Tensor]:
    """The adapter's tensors that this cohort does not train, cut from the graph."""
    return {n: p.detach() for n, p in model.named_parameters() if p.requires_grad and n not in stack}


def _is_plain(layer: Any, name: str) -> bool:
    """A stock LoRA layer on a linear base, with nothing but `A` and `B`: no DoRA, no bias, not merged.

    Further active adapters may add to it where they are frozen.
    """
    return (
        type(layer) is LoraLinear
        and all(not layer.lora_A[frozen].weight.requires_grad for frozen in layer.active_adapters[1:])
        and not layer.merged
        and not layer.disable_adapters
        and not layer.lora_variant
        and name.endswith(".weight")
        and (".lora_A." in name or ".lora_B." in name)
        and not any(layer.lora_bias.values())
    )


def _probe_stack(model: nn.Module, names: list[str]) -> Stack:
    """Two members with values of their own, so that a kernel that mixes members is caught."""
    generator = torch.Generator().manual_seed(0)
    stack = {}
    for name in names:
        value = model.get_parameter(name).detach()
        noise = torch.randn((2, *value.shape), generator=generator, dtype=torch.float32)
        stack[name] = (value + 0.02 * noise.to(value.device, value.dtype)).requires_grad_()
    return stack


def _cut(inputs: Inputs) -> Inputs:
    """The inputs with the last row's second half taken for padding."""
    if "attention_mask" not in inputs:
        return inputs
    mask = inputs["attention_mask"].clone()
    mask[-1, (mask.shape[1] + 1) // 2 :] = 0
    return {**inputs, "attention_mask": mask}


def _logits_and_gradients(forward: Forward, stack: Stack, inputs: Inputs) -> list[Tensor]:
    return with_gradients(forward(stack, inputs), list(stack.values()))


def with_gradients(logits: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Logits, and the gradients of a weighted sum of them: what two ways of one forward must have in common."""
    weights = torch.linspace(-1, 1, logits.numel(), device=logits.device).view_as(logits)
    gradients = torch.autograd.grad((logits * weights).sum(), tensors, allow_unused=True)
    return [logits.detach(), *(g for g in gradients if g is not None)]


def tolerance_of(dtype: torch.dtype) -> float:
    """How far two ways of one forward may be apart, relative: rounding, and never a mistake."""
    return 5e-2 if torch.finfo(dtype).bits < 32 else 1e-3


def agree(tensors: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    """Whether two ways of one forward gave the same, each tensor up to the rounding of its own type."""
    if len(tensors) != len(others):
        return False
    return all(close(x, y, tolerance_of(x.dtype)) for x, y in zip(tensors, others, strict=True))


def close(x: Tensor, y: Tensor, tolerance: float) -> bool:
    """Whether two tensors agree, relative to the second."""
    return x.shape == y.shape and bool((x - y).norm() <= tolerance * y.norm() + 1e-6)
