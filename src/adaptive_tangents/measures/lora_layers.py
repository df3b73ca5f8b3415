"""The layers that adapters of low rank can change, and how much each direction of their change matters."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from adaptive_tangents.capture.state_names import tied
from adaptive_tangents.errors import TangentError
from adaptive_tangents.features.blocks import Block
from adaptive_tangents.features.tangent_features import TangentFeatures

CALL = "lora_advice"
# How embeddings are called where no model says which layers are such.
_TABLE = re.compile(r"embed|(^|\.)(wte|wpe|shared)$")
_CHANGE = "singular_values.change."
_WEIGHT, _EMBEDDING = ".weight", "an embedding"
_ROUNDING = 1e-12  # of the energy: what float32 weights do not resolve


@dataclass(frozen=True)
class Layer:
    """A layer and the energy of each direction of its change, largest first; ``change`` is the matrix, where it is known."""

    shape: tuple[int, int]
    gains: Float[Tensor, " r"]
    change: Float[Tensor, "o i"] | None = None


@dataclass(frozen=True)
class Layers:
    """All layers by the name of their module, what adapters do not change, with the reason, and what is trained whole."""

    found: dict[str, Layer] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    whole: frozenset[str] = frozenset()


def layers_of(source: object, model: nn.Module | None) -> Layers:
    """The layers of any source that ``lora_advice`` takes."""
    if isinstance(source, Mapping):
        return _of_matrices(source, _kinds(model))
    if isinstance(source, tuple | list) and len(source) == 2 and all(isinstance(each, Mapping) for each in source):
        return _of_states(source[0], source[1], _kinds(model))
    if isinstance(getattr(source, "start", None), Mapping) and isinstance(getattr(source, "params", None), Mapping):
        own = getattr(source, "model", None)
        return _of_states(source.start, source.params, _kinds(own if model is None else model))  # type: ignore[attr-defined]
    if isinstance(getattr(source, "results", None), Mapping) and isinstance(getattr(source, "arrays", None), Mapping):
        return _of_inspection(source.results, source.arrays, _kinds(model))  # type: ignore[attr-defined]
    raise TangentError(
        f"{CALL}: source is a pair of state dicts (start, end), a mapping from layers to matrices of their change, a "
        f"Forecast, or an Inspection, got {type(source).__name__}"
    )


def selected(layers: Layers, wrt: str | tuple[str, ...] | None) -> Layers:
    """The layers whose module or parameter a pattern names."""
    if wrt is None:
        return layers
    patterns = (wrt,) if isinstance(wrt, str) else tuple(wrt)
    kept = {
        name: layer
        for name, layer in layers.found.items()
        if any(fnmatchcase(each, p) for each in (name, name + _WEIGHT) for p in patterns)
    }
    if not kept:
        raise TangentError(
            f"{CALL}: wrt = {wrt!r} names none of the layers; these are {_first(list(layers.found))}; use a pattern such as "
            "'*attention*'"
        )
    return Layers(kept, layers.left_out | dict.fromkeys(layers.found.keys() - kept.keys(), "not in wrt"))


def weighed(layers: Layers, feats: TangentFeatures) -> Layers:
    """The same layers with gains by what each direction does to the outputs, ‖ΦΔ‖² divided over directions."""
    blocks = {slot.parameter.removesuffix(_WEIGHT): (block, k) for block in feats.blocks.values()
              for k, slot in enumerate(block.slots)}  # fmt: skip
    found = {}
    for name, layer in layers.found.items():
        if layer.change is None:
            raise TangentError(
                f"{CALL}: features weigh matrices, and this source has singular values alone; give the pair of state dicts"
            )
        if not float(layer.gains.sum()):
            found[name] = layer
            continue
        if name not in blocks:
            raise TangentError(
                f"{CALL}: the features have no block of {name}; make them of all layers that change, or narrow wrt"
            )
        block, k = blocks[name]
        found[name] = replace(layer, gains=_weighed(block, k, layer.change, name))
    return Layers(found, layers.left_out)


def _weighed(block: Block, place: int, change: Tensor, name: str) -> Tensor:
    """The energies of LᵀΔR, G = LLᵀ and H = RRᵀ the second moments of Φ's two sides, scaled to add up to ‖ΦΔ‖²."""
    slot = block.slots[place]
    rows = change.T if slot.transposed else change
    if rows.shape != (block.shape[0], slot.width):
        raise TangentError(
            f"{CALL}: the change of {name} is {tuple(change.shape)} and its features are {(block.shape[0], slot.width)}; "
            "give features of the same network"
        )
    columns = slice(slot.column, slot.column + slot.width)
    left, right = _moments(block, columns)
    whole = torch.zeros(block.shape, dtype=right.dtype, device=right.device)
    whole[:, columns] = rows.to(whole)
    dtype = next(t.dtype for part in block.summands for t in vars(part).values() if isinstance(t, Tensor)
                 and t.is_floating_point())  # fmt: skip
    own = float((block.inner(whole[None].to(dtype)).double() ** 2).sum())
    half = _factor(left).mT @ rows.to(left) @ _factor(right)
    gains = energies(half)
    total = float(gains.sum())
    return gains * (own / total) if total > 0 else gains


def _moments(block: Block, columns: slice) -> tuple[Tensor, Tensor]:
    """Σ ΦΦᵀ (o, o) and Σ ΦᵀΦ (i, i) over samples and outputs."""
    if block.summands == (block.outer,) and block.outer is not None:
        signals, inputs = block.outer.backward.double(), block.outer.inputs.double()[..., columns]
        left = signals.new_zeros(block.shape[0], block.shape[0])
        right = signals.new_zeros(inputs.shape[2], inputs.shape[2])
        for delta, h in zip(signals, inputs, strict=True):  # (t, c, o), (t, i)
            across = (h @ h.mT).reshape(len(h), -1)
            mixed = (across @ delta.flatten(1)).view_as(delta)
            left += delta.flatten(0, 1).mT @ mixed.flatten(0, 1)
            right += h.mT @ (torch.einsum("tco,sco->ts", delta, delta) @ h)
        return left, right
    left = right = torch.zeros((), device="cpu")
    for k in range(block.samples):
        phi = block.map(index=slice(k, k + 1), dtype=torch.float64).features()[0][..., columns]
        left, right = left + torch.einsum("coi,cpi->op", phi, phi), right + torch.einsum("coi,coj->ij", phi, phi)
    return left, right


def _factor(moment: Tensor) -> Tensor:
    """A root L of a moment LLᵀ, which may be singular."""
    lifted = moment + _ROUNDING * moment.trace() * torch.eye(len(moment), device="cpu").to(moment)
    factor: Tensor
    factor, failed = torch.linalg.cholesky_ex(lifted)
    if int(failed):
        values, vectors = torch.linalg.eigh(moment)
        factor = vectors * values.clamp_min(0).sqrt()
    return factor


def energies(matrix: Tensor) -> Tensor:
    """Squared singular values, largest first, without those that are rounding."""
    wide = matrix.detach().double().cpu()
    gram = wide @ wide.mT if wide.shape[0] <= wide.shape[1] else wide.mT @ wide
    return _unrounded(torch.linalg.eigvalsh(gram).flip(0))


def _unrounded(values: Tensor) -> Tensor:
    values = values.clamp_min(0)
    return torch.where(values > _ROUNDING * values.sum(), values, 0.0)


def _kinds(model: nn.Module | None) -> dict[str, str] | None:
    """Why an adapter cannot change a module, empty where it can; None without a model."""
    if model is None:
        return None
    found = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            found[name] = _EMBEDDING
        elif getattr(module, "groups", 1) != 1:
            found[name] = "a grouped convolution"
        elif isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d) or type(module).__name__ == "Conv1D":
            found[name] = ""
        elif isinstance(weight, Tensor) and weight.ndim > 1:
            found[name] = f"a {type(module).__name__}, which has no adapters of low rank"
    groups: dict[str, list[str]] = {}
    for name, first in tied(model).items():
        groups.setdefault(first, [first.removesuffix(_WEIGHT)]).append(name.removesuffix(_WEIGHT))
    for group in groups.values():
        table = next((name for name in group if found.get(name) == _EMBEDDING), None)
        if table is not None:
            found |= {name: f"tied to {table}" for name in group if name != table}
    return found


def _reason(name: str, kinds: Mapping[str, str] | None) -> str:
    """Why adapters leave a module out; empty if they do not."""
    if kinds is None:
        return f"{_EMBEDDING}, by its name" if _TABLE.search(name.lower()) else ""
    return kinds.get(name, "no layer of the model")


def _of_matrices(changes: Mapping[Any, Any], kinds: Mapping[str, str] | None) -> Layers:
    made = Layers()
    for key, value in changes.items():
        matrix = value if isinstance(value, Tensor) else None
        if isinstance(value, np.ndarray):
            matrix = torch.as_tensor(value, device="cpu")
        if not isinstance(key, str) or matrix is None or matrix.is_complex():
            raise TangentError(
                f"{CALL}: a mapping holds names and matrices of change as real tensors, got {key!r}: {type(value).__name__}; "
                "give two state dicts as a pair (start, end)"
            )
        _put(made, key.removesuffix(_WEIGHT), matrix, kinds)
    return _checked(made)


def _of_states(start: Mapping[str, Any], end: Mapping[str, Any], kinds: Mapping[str, str] | None) -> Layers:
    made, states = Layers(), (start, end)
    tables = [name for name in {**start, **end} if _EMBEDDING in _reason(name.removesuffix(_WEIGHT), kinds)]
    for name in {**start, **end}:
        held = [state[name] for state in states if name in state]
        if not all(isinstance(value, Tensor) and value.is_floating_point() and value.ndim for value in held):
            continue
        module = name.removesuffix(_WEIGHT)
        if len({value.shape for value in held}) > 1:
            raise TangentError(
                f"{CALL}: {name} is {tuple(held[0].shape)} at the start and {tuple(held[1].shape)} at the end; give states "
                "of one network"
            )
        table = None if name in tables else next((table for table in tables if _tied(name, table, states)), None)
        if table is not None:
            made.left_out[module] = f"tied to {table.removesuffix(_WEIGHT)}"
        elif not name.endswith(_WEIGHT):
            if not name.endswith("bias"):
                made.left_out[name] = "no weight of a layer"
        elif len(held) < 2:
            made.left_out[module] = f"in the state at the {'start' if name in start else 'end'} alone"
        else:
            _put(made, module, held[1].detach().double() - held[0].detach().double(), kinds)
    return _checked(made)


def _tied(name: str, table: str, states: tuple[Mapping[str, Any], Mapping[str, Any]]) -> bool:
    """Whether two names are of one tensor: in memory in some state, or, as after a copy, by values that change alike."""
    pairs = [(state[name], state[table]) for state in states if name in state and table in state]
    if not pairs or any(one.shape != other.shape or one.is_meta or other.is_meta for one, other in pairs):
        return False
    if any(one.numel() and one.data_ptr() == other.data_ptr() for one, other in pairs):
        return True
    alike = all(
        one.dtype == other.dtype and one.device == other.device and torch.equal(one, other) for one, other in pairs
    )
    return len(pairs) == 2 and alike and not torch.equal(pairs[0][0].to(pairs[1][0]), pairs[1][0])


def _put(made: Layers, name: str, change: Tensor, kinds: Mapping[str, str] | None) -> None:
    """Add a layer, or say why it is left out."""
    if not bool(torch.isfinite(change).all()):
        raise TangentError(
            f"{CALL}: the change of {name} is not finite; give checkpoints of a training that did not diverge"
        )
    if change.ndim < 2:
        made.left_out[name] = "no matrix"
        return
    why = _reason(name, kinds)
    matrix = change.flatten(1).double().cpu()
    if why:
        made.left_out[name] = why
    else:
        made.found[name] = Layer((matrix.shape[0], matrix.shape[1]), energies(matrix), matrix)


def _of_inspection(results: Mapping[str, Any], arrays: Mapping[str, Any], kinds: Mapping[str, str] | None) -> Layers:
    """The layers of an inspection; a bias counts as a column of its layer."""
    made = Layers()
    for name, numbers in results.get("blocks", {}).items():
        values = arrays.get(_CHANGE + name)
        o, i = numbers["shape"]
        module = name.removesuffix(_WEIGHT)
        if min(o, i) < 2 and not (kinds and kinds.get(module) == ""):
            made.left_out[module] = "no matrix"
        elif why := _reason(module, kinds):
            made.left_out[module] = why
        elif values is not None:
            made.found[module] = Layer(
                (o, i), _unrounded(torch.as_tensor(np.asarray(values), device="cpu").double() ** 2)
            )
    return _checked(made)


def _checked(layers: Layers) -> Layers:
    if not layers.found:
        raise TangentError(
            f"{CALL}: there is no layer with a matrix that changed; left out: {_first(list(layers.left_out)) or 'nothing'}"
        )
    return layers


def _first(names: list[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
