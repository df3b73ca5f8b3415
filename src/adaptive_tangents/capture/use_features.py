"""Features of a block from the uses of its parameters in the autograd graph.

Uses that are made alike, such as those of a recurrent weight at every step, are made together.
"""

from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor

from adaptive_tangents.capture.graph import operation
from adaptive_tangents.capture.graph_uses import Step, Term, UseKey, keyed
from adaptive_tangents.capture.groups import TOGETHER, Group
from adaptive_tangents.capture.layers import convolution_of, learning, lookup, normalized_channels
from adaptive_tangents.capture.sample_layouts import SampleLayout, arranged, gathered
from adaptive_tangents.features.blocks import Block, Slot
from adaptive_tangents.features.summands import Dense, Flipped, Lookup, Outer, Summand

_Made = Outer | Lookup | Flipped | Dense

_VIEWS = (
    "T", "Transpose", "Permute", "View", "UnsafeView", "ReshapeAlias", "Unsqueeze", "Squeeze", "Slice", "Split",
    "SplitWithSizes", "UnsafeSplit", "UnsafeSplitWithSizes", "Unbind", "Select", "Alias", "Clone",
)  # fmt: skip
_SINGLE = ("bilinear", "convolution")  # kinds whose uses are made one by one


def block_of(
    group: Group,
    terms: Mapping[str, list[Term]],
    gradients: Mapping[tuple[Any, int], Tensor],
    out: Tensor,
    layouts: Mapping[UseKey, SampleLayout],
) -> Block:
    """The block made from uses in the graph, each in its parameter's columns."""
    (n, c), (rows, width) = out.shape, group.matrix
    parts: list[Summand] = []
    # Products that may add the bias, too: its input column is one.
    added = (
        {t.node for t in terms[group.slots[1].parameter] if not t.chain and t.factor == 1} if group.joined else set()
    )
    both = set[Any]()
    uses = keyed(terms)
    for slot in group.slots:
        first = group.joined and slot is group.slots[0]
        left = [(layouts[key], term) for key, term in uses[slot.parameter] if term.node not in both]
        for way, alike in _alike(left, gradients, added if first else set()):
            made = part(alike, slot, rows, way, [gradients[term.node, 0] for term in alike], n)
            ones = isinstance(made, Outer) and alike[0].shape[-1] == rows and alike[0].node in added and first
            if ones:
                both.update(term.node for term in alike)
            parts.append(_in_columns(made, slot, width, ones=ones, joined=group.joined))
    return group.of(parts or [Dense(out.new_zeros(()).expand(n, c, rows, width))])


def _alike(
    uses: Sequence[tuple[SampleLayout, Term]], gradients: Mapping[tuple[Any, int], Tensor], added: set[Any]
) -> list[tuple[SampleLayout, list[Term]]]:
    """The uses in groups that are made alike: as many as are joined at a time."""
    groups = defaultdict[Any, list[Term]](list)
    for way, term in uses:
        how = term.kind, operation(term.node), term.index, term.shape, term.tail, term.factor
        groups[way, how, term.node in added, tuple(map(_step_key, term.chain))].append(term)
    found: list[tuple[SampleLayout, list[Term]]] = []
    for (way, *_), alike in groups.items():
        first = alike[0]
        most = max(1, TOGETHER // max(1, gradients[first.node, 0].nbytes)) if first.kind not in _SINGLE else 1
        found += [(way, alike[k : k + most]) for k in range(0, len(alike), most)]
    return found


def _step_key(step: Step) -> Hashable:
    """Equal for operations that do the same: one node, or views with the same settings."""
    settings = (
        [getattr(step.node, name) for name in _settings(cast(Hashable, type(step.node)))] if _is_view(step) else []
    )
    if not _is_view(step) or any(isinstance(value, Tensor) for value in settings):
        return step.node, step.index, step.output
    shapes = tuple([tuple(made.shape) for made in step.node._input_metadata])
    return operation(step.node), step.index, step.output, step.shape, shapes, repr(settings)


def _is_view(step: Step) -> bool:
    return operation(step.node) in _VIEWS


@cache
def _settings(kind: Any) -> list[str]:
    return [name for name in dir(kind) if name.startswith("_saved")]


# Features of terms that are made alike, from the gradients g (c, *shape) at their outputs.


def part(terms: Sequence[Term], slot: Slot, rows: int, way: SampleLayout, gradients: list[Tensor], n: int) -> _Made:
    """The features of terms that are made alike, in the columns (o, width) of their slot."""
    term = terms[0]
    if term.kind == "lookup":
        looked = _looked_up(terms, way, gradients, n)
        if not term.chain and slot.transposed:
            return looked
        return Dense(slot.place(_undone(looked.features(slice(None)).mT, term), rows))
    if term.kind in ("product", "bilinear", "convolution"):
        outer = _product(terms, way, gradients, n)
        if isinstance(outer, Outer):
            matrix = _as_matrix(term, slot, outer, rows)
            if matrix is not None:
                return matrix
            values = outer.features(slice(None))  # (n, c, outputs, inputs)
        else:
            values = outer.values
        values = values.mT if term.kind == "product" else values
        return Dense(slot.place(_undone(values.reshape(*values.shape[:2], *term.tail), term), rows))
    scaled = [_scaled(t, way, gradient, n) for t, gradient in zip(terms, gradients, strict=True)]
    total = scaled[0] if len(scaled) == 1 else torch.stack(scaled).sum(0)
    return Dense(slot.place(_undone(_reduced(term, way, total, n), term), rows))


def _looked_up(terms: Sequence[Term], way: SampleLayout, gradients: Sequence[Tensor], n: int) -> Lookup:
    term, c = terms[0], len(gradients[0])
    index = _side_by_side([arranged(t.node._saved_indices, way, n).reshape(n, -1) for t in terms], 1)
    signals = [arranged(g, way, n, lead=1).reshape(c, n, -1, g.shape[-1]) for g in gradients]
    backward = _side_by_side(signals, 2).permute(1, 2, 0, 3).contiguous()
    weights = learning(index, term.node._saved_padding_idx, gradients[0])
    return lookup(backward, index, term.tail[0], weights)


def _product(terms: Sequence[Term], way: SampleLayout, gradients: Sequence[Tensor], n: int) -> Outer | Dense:
    term, saved = terms[0], terms[0].node
    signals = [arranged(g.reshape(len(g), *term.shape), way, n, lead=1) for g in gradients]
    if term.kind == "convolution":
        made = gathered(
            convolution_of(saved, arranged(saved._saved_input.detach(), way, n), signals[0], term.tail[2:]), n
        )
        assert not isinstance(made, Lookup)
        return made
    if term.kind == "bilinear":
        x, y = (arranged(t.detach().reshape(term.shape[0], -1), way, n) for t in (saved._saved_i1, saved._saved_i3))
        rows = [(x[:, :, None] * y[:, None]).flatten(1)]
    else:
        name = "_saved_mat1" if operation(saved) == "Addmm" else "_saved_self"
        found = (getattr(t.node, name).detach() for t in terms)
        rows = [arranged(matrix.reshape(matrix.shape[-2:]), way, n) for matrix in found]
    c, o = signals[0].shape[0], signals[0].shape[-1]
    backward = _side_by_side([g.reshape(c, n, -1, o) for g in signals], 2).permute(1, 2, 0, 3).contiguous()
    return Outer(backward, _side_by_side([matrix.reshape(n, -1, matrix.shape[-1]) for matrix in rows], 1))


def _side_by_side(tensors: list[Tensor], dim: int) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim)


def _as_matrix(term: Term, slot: Slot, outer: Outer, rows: int) -> Outer | Flipped | None:
    """The factors as factors of the slot's matrix, if the chain only moves entries into rows of it; otherwise None."""
    if not all(map(_is_view, term.chain)):
        return None
    o, i = outer.backward.shape[-1], outer.inputs.shape[-1]
    # Number the entries and see where the chain moves them: (i, o) for products, (o, i) otherwise.
    count = torch.arange(1, o * i + 1, dtype=torch.float64, device=outer.inputs.device)
    numbers = count.reshape(i, o).mT if term.kind == "product" else count.reshape(o, i)
    arrived = slot.place(_back(count.reshape(1, *term.tail), term.chain)[0], rows)
    for flipped in (False, True):
        expected = numbers.mT if flipped else numbers
        height = expected.shape[0]
        if expected.shape[1] != arrived.shape[1] or height > arrived.shape[0]:
            continue
        first = int((arrived[:, 0] != 0).nonzero()[0]) if bool(arrived.any()) else 0
        if first + height > arrived.shape[0] or not torch.equal(arrived[first : first + height], expected):
            continue
        if float(arrived.abs().sum()) != float(expected.sum()):
            continue
        above, below = first, arrived.shape[0] - first - height
        pad = torch.nn.functional.pad
        if flipped:
            return Flipped(outer.backward, pad(outer.inputs, (above, below)))
        return Outer(pad(outer.backward, (above, below)), outer.inputs)
    return None


def _scaled(term: Term, way: SampleLayout, gradient: Tensor, n: int) -> Tensor:
    """The gradient times what stands in front of the arriving value."""
    saved: Any = term.node
    g, name = term.factor * gradient if term.factor != 1 else gradient, operation(saved)
    if term.kind == "normalized":
        g = arranged(g, way, n, lead=1)
        return g * arranged(normalized_channels(saved, name).detach(), way, n).reshape(g.shape[1:])
    if term.kind != "scale":
        return g
    if name == "NativeLayerNorm":
        other = (saved._saved_input - saved._saved_result1) * saved._saved_result2
    elif name == "PreluKernel":
        other = saved._saved_self.clamp_max(0)
    else:
        other = saved._saved_other if term.index == 0 else saved._saved_self
    scaled: Tensor = g * other.detach()
    return scaled


def _reduced(term: Term, way: SampleLayout, g: Tensor, n: int) -> Tensor:
    """∂f/∂(arriving value), (n, c, *tail), of a sum, a scale, or one value per channel, from what `_scaled` gives."""
    c = len(g)
    if term.kind in ("channels", "normalized"):
        g = arranged(g, way, n, lead=1) if term.kind == "channels" else g
        channels = term.tail[0]
        return g.reshape(c, n, -1, channels, g[0, 0, 0].numel()).sum((2, 4)).transpose(0, 1)
    k = g.shape[1] // n
    if way == "second":
        g = g.transpose(1, 2).unsqueeze(3)
    elif way == "last":
        g = g.reshape(c, k, n, *g.shape[2:]).transpose(1, 2)
    else:
        g = g.reshape(c, n, k, *g.shape[2:])
    tail = (1,) * (g.ndim - 2 - len(term.tail)) + term.tail
    summed = [2 + d for d, size in enumerate(tail) if size == 1 and g.shape[2 + d] != 1]
    g = g.sum(summed, keepdim=True) if summed else g
    return g.reshape(c, n, *term.tail).transpose(0, 1)


def _undone(values: Tensor, term: Term) -> Tensor:
    """From ∂f/∂(arriving value) (n, c, *tail) to ∂f/∂θ (n, c, *shape), through the operations without samples."""
    n, c = values.shape[:2]
    back = _back(values.reshape(n * c, *term.tail), term.chain)
    return back.reshape(n, c, *back.shape[1:])


def _back(values: Tensor, chain: Sequence[Step]) -> Tensor:
    functorch: Any = torch._C._functorch
    loops = functorch._is_vmap_fallback_enabled()
    with torch.no_grad():
        for step in reversed(chain):
            if len(values) == 1:
                values = _step_back(step, values[0])[None]
                continue
            try:
                functorch._set_vmap_fallback_enabled(False)  # vmap's own loop is no faster, and warns
                values = torch.func.vmap(lambda g, step=step: _step_back(step, g))(values)
            except RuntimeError:
                values = torch.stack([_step_back(step, g) for g in values])
            finally:
                functorch._set_vmap_fallback_enabled(loops)
    return values


def _step_back(step: Step, gradient: Tensor) -> Tensor:
    shapes = [tuple(metadata.shape) for metadata in step.node._input_metadata]
    given = [gradient if k == step.output else gradient.new_zeros(shape) for k, shape in enumerate(shapes)]
    node: Any = step.node
    found = node(*given)
    back: Tensor = found[step.index] if isinstance(found, tuple) else found
    # A broadcast gradient comes back unsummed: autograd's engine would sum it.
    return back if back.shape == step.shape else back.sum_to_size(step.shape)


def _in_columns(made: _Made, slot: Slot, width: int, *, ones: bool, joined: bool) -> _Made:
    """The features of a parameter in its columns of a block; ``ones`` sets the last input column to one, for the bias."""
    around = (slot.column, width - slot.column - slot.width)
    if isinstance(made, Dense) and joined and slot.width == 1:
        axis = torch.zeros(width, dtype=made.values.dtype, device=made.values.device)
        axis[slot.column] = 1
        return Outer(made.values[:, None, :, :, 0], axis.expand(len(made.values), 1, width))
    if around == (0, 0):
        return made
    pad = torch.nn.functional.pad
    if isinstance(made, Outer):
        inputs = pad(made.inputs, around)
        if ones:
            inputs[..., -1] = 1
        return Outer(made.backward, inputs)
    if isinstance(made, Flipped):
        return Flipped(pad(made.backward, around), made.inputs)
    assert isinstance(made, Dense)
    return Dense(pad(made.values, around))
