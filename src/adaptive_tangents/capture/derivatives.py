"""Gradients of every output: at edges of the autograd graph, of random combinations as a check, or sample by sample."""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from operator import attrgetter
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from torch.autograd.graph import GradientEdge

from adaptive_tangents.capture.batches import Batch, refilled, samples, take, tensors
from adaptive_tangents.capture.graph import read_graph
from adaptive_tangents.capture.held_nodes import free_graphs, held_nodes
from adaptive_tangents.capture.live_positions import LiveGradients
from adaptive_tangents.capture.network import Network
from adaptive_tangents.features.blocks import Block
from adaptive_tangents.features.summands import (
    Dense,
    Flipped,
    Lookup,
    Outer,
    Shared,
    Summand,
    Weighted,
    sum_tensors,
    tensors_of,
)
from adaptive_tangents.linalg.factor_products import times
from adaptive_tangents.linalg.hadamard import Row
from adaptive_tangents.runtime.memory import empty

# Operations whose batched backward pass is one large product. Others would run output by output anyway, and joining
# their results costs more than the batch saves.
_BATCHED = {
    "Addmm", "Mm", "T", "Transpose", "View", "UnsafeView", "ReshapeAlias", "Relu", "Tanh", "Sigmoid", "Add", "Sub",
    "Mul", "Permute", "AccumulateGrad", "CopySlices",
}  # fmt: skip
_SURE = 0.01  # of what is allowed
_SMALL = 64_000_000  # bytes of gradients
_COPIED = 30_000  # numbers per sample; above this, gathering samples takes longer than a loop over them


@dataclass(frozen=True)
class Gradients:
    """Gradients (c, ...) of every output at an edge; with ``live``, (c, n, s, o) at those positions of each sample."""

    values: Tensor
    live: Int[Tensor, "n s"] | None = None


def backward(
    out: Tensor,
    edges: Sequence[GradientEdge],
    *,
    channels_last: Sequence[bool],
    held: Sequence[bool],
    narrow: Sequence[bool],
    seen: Callable[[slice, list[Tensor]], None],
    operations: Collection[str],
    batched: bool = False,
) -> list[Gradients | None]:
    """Gradients (c, ...) of every output, summed over samples that do not interact, at each edge that is ``held``.

    With ``channels_last`` the last dimension stays innermost in memory, otherwise all dimensions but the first do. An
    edge that is ``narrow``, (n, *positions, o), may come as (c, n, s, o) at the positions where gradients are not zero.
    ``seen`` is called with ranges of outputs and the gradients at all edges, held or not. ``operations`` are the graph's.
    With ``batched``, small gradients come from one batched pass if all operations are torch's own: some of torch's rules for
    batched passes are wrong for some sizes, so what is made of them must be checked.
    """
    if not edges:
        return []
    found: list[Tensor] | None = None
    if out.shape[1] == 1:
        found = [gradient[None] for gradient in _of_output(out, edges, 0)]
    elif _BATCHED.issuperset(operations) or (batched and all(operations) and _small(out, edges)):
        found = _all_at_once(out, edges)
    if found is None:
        return _one_by_one(out, edges, channels_last, held, narrow, seen)
    seen(slice(0, out.shape[1]), found)
    return [_narrowed(g) if few and kept else Gradients(g) for g, few, kept in zip(found, narrow, held, strict=True)]


def _narrowed(gradients: Tensor) -> Gradients:
    """Gradients (c, n, *positions, o), at the live positions if these are few."""
    rows = gradients.movedim(0, -2).flatten(-2)
    live = LiveGradients(tuple(rows.shape))
    live.add(rows)
    if not live.few:
        return Gradients(gradients)
    made, index = live.joined()
    n, t, _ = made[0].shape
    return Gradients(made[0].reshape(n, t, len(gradients), -1).movedim(-2, 0), index)


def _small(out: Tensor, edges: Sequence[GradientEdge]) -> bool:
    numbers = sum(math.prod(_edge_shape(edge)) for edge in edges)
    return numbers * out.shape[1] * out.element_size() <= _SMALL


def _all_at_once(out: Tensor, edges: Sequence[GradientEdge]) -> list[Tensor] | None:
    """Gradients by one batched pass, or None if some operation has no batched pass."""
    n, c = out.shape
    selectors = torch.eye(c, dtype=out.dtype, device=out.device)[:, None, :].expand(c, n, c)
    functorch: Any = torch._C._functorch
    loops = functorch._is_vmap_fallback_enabled()
    try:
        functorch._set_vmap_fallback_enabled(False)  # vmap's own loop is no faster, and warns
        with suppress(RuntimeError):
            found = torch.autograd.grad(
                out, edges, selectors, retain_graph=True, is_grads_batched=True, allow_unused=True,
                materialize_grads=False,
            )  # fmt: skip
            return [
                out.new_zeros((c, *_edge_shape(edge))) if gradient is None else gradient
                for gradient, edge in zip(found, edges, strict=True)
            ]
    finally:
        functorch._set_vmap_fallback_enabled(loops)
    return None


def _one_by_one(
    out: Tensor,
    edges: Sequence[GradientEdge],
    channels_last: Sequence[bool],
    held: Sequence[bool],
    narrow: Sequence[bool],
    seen: Callable[[slice, list[Tensor]], None],
) -> list[Gradients | None]:
    """Gradients by one pass per output; held ones are written side by side."""
    places = [-2 if last else 1 for last in channels_last]  # the dimension of the outputs
    kept: dict[int, Tensor] = {}
    live: dict[int, LiveGradients] = {}
    for j in range(out.shape[1]):
        gradients = _of_output(out, edges, j)
        seen(slice(j, j + 1), [gradient[None] for gradient in gradients])
        for k, gradient in enumerate(gradients):
            if j == 0 and held[k] and narrow[k]:
                first = LiveGradients(tuple(gradient.shape))
                first.add(gradient)
                if first.few:
                    live[k] = first
                    continue
            if k in live:
                live[k].add(gradient)
            elif held[k]:
                if k not in kept:
                    shape = list(gradient.shape)
                    shape.insert(-1 if channels_last[k] else 1, out.shape[1])
                    kept[k] = empty(shape, gradient)
                kept[k].select(places[k], j).copy_(gradient)
    found: list[Gradients | None] = [
        Gradients(kept[k].movedim(place, 0)) if k in kept else None for k, place in enumerate(places)
    ]
    for k, some in live.items():
        found[k] = Gradients(*some.joined())
    return found


def _of_output(out: Tensor, edges: Sequence[GradientEdge], j: int) -> list[Tensor]:
    selector = torch.zeros_like(out)
    selector[:, j] = 1
    found = torch.autograd.grad(out, edges, selector, retain_graph=True, allow_unused=True)
    return [
        out.new_zeros(_edge_shape(edge)) if gradient is None else gradient
        for gradient, edge in zip(found, edges, strict=True)
    ]


def _edge_shape(edge: GradientEdge) -> tuple[int, ...]:
    return tuple(edge.node._input_metadata[edge.output_nr].shape)


def mixed(out: Tensor) -> Tensor:
    """A fixed random combination of the outputs (n, 1)."""
    return out @ _mixture(out.shape[1]).to(out)


def _mixture(c: int) -> Tensor:
    return torch.randn(c, 1, generator=torch.Generator("cpu").manual_seed(1), dtype=torch.float32, device="cpu")


def tolerance(dtype: torch.dtype, device: torch.device) -> float:
    """The relative difference above which features are wrong; errors of reduced precision stay below it.

    ``dtype`` is the least precise dtype in the computation. In float32, correct features of networks of tens of layers
    differ by at most 1e-5. Wrong ones can differ by little, if inputs are far from zero or a use is a small part of all.
    """
    if dtype == torch.float64:
        return 1e-6
    if dtype == torch.float32 and not _reduced(device):
        return 3e-4
    return max(1e-2, 16 * torch.finfo(dtype).eps)


def _reduced(device: torch.device) -> bool:
    """Whether products of float32 numbers may be computed in lower precision."""
    if device.type == "cpu":
        kinds = ("mkldnn.matmul", "mkldnn.conv", "mkldnn.rnn")
    elif device.type == "cuda":
        kinds = ("cuda.matmul", "cudnn.conv", "cudnn.rnn")
    else:
        return True
    try:
        found = {attrgetter(kind)(torch.backends).fp32_precision for kind in kinds}
    except AttributeError:  # an older torch, without these settings
        return device.type != "cpu" or torch.get_float32_matmul_precision() != "highest"
    return not found <= {"none", "ieee"}


def projections(blocks: Mapping[str, Block], index: Tensor | None = None) -> dict[str, Tensor]:
    """One number per sample of each block, sᵀ(Σ_c a_c Φ_c)r, with random signs s and r and the combination a of `mixed`.

    ``index`` selects samples; without it, the features are those of the combination already.
    """
    found = {}
    for name, block in blocks.items():
        like = tensors_of(block.summands[0])[0]
        wide = torch.promote_types(like.dtype, torch.float32)
        a = (torch.ones(1, 1, device="cpu") if index is None else _mixture(block.outputs)).to(like.device, wide)
        sides = Row(signs(block.shape[0], 0)), Row(signs(block.shape[1], 1))
        values = [
            sum_tensors([part.coordinates(*sides) for part in some.map(dtype=wide).summands])
            for some in ([block] if index is None else _taken(block, index))
        ]
        found[name] = (torch.cat(values)[..., 0] @ a)[:, 0]
    return found


def _taken(block: Block, index: Tensor) -> list[Block]:
    """Some of the samples: together, or one by one if copying them would take longer."""
    held = [tensor for part in block.summands for tensor in tensors_of(part)[:1]]
    if max(tensor[:1].numel() for tensor in held) < _COPIED:
        return [block.map(index=index.to(held[0].device))]
    return [block.map(index=slice(k, k + 1)) for k in index.tolist()]


@lru_cache(maxsize=256)
def signs(size: int, side: int) -> Tensor:
    """Random signs for the rows (side 0) or the columns (side 1) of a matrix, float32; copy them before a write."""
    bits = torch.randint(2, (size,), generator=torch.Generator("cpu").manual_seed(side), device="cpu")
    return 1 - 2 * bits.float()


def spreads(blocks: Mapping[str, Block]) -> dict[str, Tensor]:
    """The squared scale of rounding errors in `projections`, from the features of a combination."""
    found = {}
    for name, block in blocks.items():
        like = tensors_of(block.summands[0])[0]
        wide = torch.promote_types(like.dtype, torch.float32)
        w = torch.ones(block.samples, 1, dtype=wide, device=like.device)
        found[name] = sum_tensors([_spread(part, w) for part in block.map(dtype=wide).summands])
    return found


def disproved(
    out: Tensor, leaves: Mapping[str, Tensor], blocks: Mapping[str, Block], dtype: torch.dtype
) -> frozenset[str]:
    """Blocks whose features, summed with random weights over samples and outputs, are not the gradient of that sum.

    This catches what no layer rule can see, such as samples in another order inside the model, or a changed ``Linear``.
    Both are compared along a random direction of the input side, which is cheaper than whole matrices. ``dtype`` is the
    least precise dtype in the graph.
    """
    if not blocks:
        return frozenset()
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(out.shape, generator=generator, device="cpu").to(out)
    names = [slot.parameter for block in blocks.values() for slot in block.slots]
    found = torch.autograd.grad(out, [leaves[name] for name in names], weights, retain_graph=True, allow_unused=True)
    gradients = {
        name: torch.zeros_like(leaves[name])
        if gradient is None
        else gradient.to_dense()
        if gradient.is_sparse
        else gradient
        for name, gradient in zip(names, found, strict=True)
    }
    wide = torch.promote_types(out.dtype, torch.float32)
    w, allowed = weights.to(wide), tolerance(dtype, out.device)
    # One direction for all: entries of the longest are random, and so are those of any part of it.
    longest = max(block.shape[1] for block in blocks.values())
    direction = torch.randn(longest, generator=generator, device="cpu").to(w)
    theirs, gaps = list[Tensor](), list[Tensor]()
    for block in blocks.values():
        o, i = block.shape
        # Parameter by parameter: joining them into a matrix would copy them.
        columns = [
            slot.place(gradients[slot.parameter], o).to(wide) @ direction[slot.column : slot.column + slot.width]
            for slot in block.slots
        ]
        theirs.append(sum_tensors(columns))
        gaps.append(
            sum_tensors([_along(part, w, direction[:i]) for part in block.map(dtype=wide).summands]) - theirs[-1]
        )
    wrong = []
    sizes, norms = (torch.stack(torch._foreach_norm(some)).tolist() for some in (theirs, gaps))
    for (name, block), size, gap in zip(blocks.items(), sizes, norms, strict=True):
        if gap <= _SURE * allowed * size:
            continue  # and so below the rounding errors of the terms, which are larger than a hundredth of their sum
        if gap > allowed * float(sum_tensors([_spread(part, w) for part in block.map(dtype=wide).summands]).sqrt()):
            wrong.append(name)
    return frozenset(wrong)


def _along(part: Summand, w: Tensor, direction: Tensor) -> Tensor:
    """A weighted sum of features, as a matrix, times a direction of the input side."""
    if isinstance(part, Outer):
        signals = w[:, None, :] * times(part.inputs, direction[:, None])
        inner = part.backward.permute(0, 2, 3, 1)
        if inner.shape[3] > 1 and inner.is_contiguous():
            return (inner.flatten(0, 1) @ signals.transpose(1, 2).flatten(0, 1)[..., None]).sum(0)[:, 0]
        return signals.flatten() @ part.backward.reshape(-1, part.backward.shape[-1])
    return part.combine(w) @ direction


def _spread(part: Summand, w: Tensor) -> Tensor:
    """Roughly the sum of squares of a weighted sum's terms: the squared scale of its rounding error."""
    weights = w.square().mean(1)
    if isinstance(part, Dense):
        return (weights * _norms(part.values) ** 2).sum()
    inputs = part.weights if isinstance(part, Lookup) else part.inputs if isinstance(part, Outer | Flipped) else None
    assert inputs is not None
    positions = max(1, inputs.shape[1])
    assert not isinstance(part, Shared | Weighted)
    return (weights * _norms(part.backward) ** 2 * _norms(inputs) ** 2).sum() / positions


def _norms(tensor: Tensor) -> Tensor:
    """The norm for each sample."""
    norms: Tensor = torch.linalg.vector_norm(tensor, dim=tuple(range(1, tensor.ndim)))
    return norms


def materialize(net: Network, names: list[str], x: Batch, *, chunk: int) -> dict[str, Tensor]:
    """∂f/∂θ (n, c, *shape) of parameters without factors: by vmap, ``chunk`` samples at once, or one by one.

    Some operations have a batching rule that is wrong for some sizes (a PReLU with as many samples as outputs). So the
    result of vmap is used only if it agrees with autograd.
    """
    chosen = {name: net.parameters[name].detach() for name in names}

    def single(parameters: dict[str, Tensor], sample: list[Tensor]) -> Tensor:
        return net(refilled(x, [tensor[None] for tensor in sample]), parameters)[0]

    with suppress(RuntimeError):
        made = torch.func.vmap(torch.func.jacrev(single), in_dims=(None, 0), chunk_size=chunk)(chosen, tensors(x))
        values = {name: made[name].detach() for name in names}
        stand = _stand(net, x, values)
        free_graphs()
        if stand:
            return values
    return _sample_by_sample(net, names, x)


def _stand(net: Network, x: Batch, values: Mapping[str, Tensor]) -> bool:
    """Whether features, summed with random weights over samples and outputs, equal the gradient of that sum."""
    leaves = {name: leaf for name, leaf in net.leaves().items() if name in values}
    with torch.enable_grad(), saved_copies():
        out = net(x, leaves)
        if not out.requires_grad:
            return not any(bool(part.any()) for part in values.values())
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(0), device="cpu").to(out)
        gradients = torch.autograd.grad(out, list(leaves.values()), weights, allow_unused=True)
    with held_nodes() as nodes:
        allowed = tolerance(read_graph(out, {}, nodes).dtype, out.device)
    wide = torch.promote_types(out.dtype, torch.float32)
    w = weights.flatten().to(wide)
    for part, gradient in zip(values.values(), gradients, strict=True):
        rows = part.flatten(0, 1).reshape(len(w), -1).to(wide)
        total, size = w @ rows, (w * torch.linalg.vector_norm(rows, dim=1)).norm()
        if gradient is not None:
            total = total - (gradient.to_dense() if gradient.is_sparse else gradient).flatten().to(wide)
        if not bool(total.norm() <= allowed * size):
            return False
    return True


@contextmanager
def saved_copies() -> Iterator[None]:
    """Let autograd save copies, so that nothing overwrites them."""
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor.detach().clone(), lambda tensor: tensor):
        yield


def _sample_by_sample(net: Network, names: list[str], x: Batch) -> dict[str, Tensor]:
    rows: dict[str, list[Tensor]] = {name: [] for name in names}
    for k in range(samples(x)):
        leaves = {name: leaf for name, leaf in net.leaves().items() if name in rows}
        with torch.enable_grad():
            out = net(take(x, slice(k, k + 1)), leaves)[0]
            per_output = [
                torch.autograd.grad(
                    value, list(leaves.values()), retain_graph=True, allow_unused=True, materialize_grads=True
                )
                if value.requires_grad
                else [torch.zeros_like(leaf) for leaf in leaves.values()]
                for value in out
            ]
        for name, gradients in zip(leaves, zip(*per_output, strict=True), strict=True):
            rows[name].append(torch.stack([g.to_dense() if g.is_sparse else g for g in gradients]))
    return {name: torch.stack(parts) for name, parts in rows.items()}
