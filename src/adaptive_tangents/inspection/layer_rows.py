"""The blocks' numbers rolled up by layer, from the kernels that were measured."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from adaptive_tangents.features.layer_names import Layer, layers_of
from adaptive_tangents.inspection import measures
from adaptive_tangents.inspection.measures import STAGES, Kernels, defined, rank_of, total
from adaptive_tangents.inspection.starts import NO_KERNEL, ZERO, new_head, without_kernel
from adaptive_tangents.measures.alignment import alignment, cka

_SUMMED = ("change_share", "trace_change_share")


def layer_rows(
    blocks: Mapping[str, Mapping[str, Any]],
    kernels: Mapping[str, Kernels],
    change: Tensor,
    target: Tensor | None,
    values: Kernels,
    squares: Mapping[str, Mapping[str, list[float]]],
    plain: Mapping[str, str],
    outputs: int,
) -> list[dict[str, Any]]:
    """A row for every layer: shares of the change, growth, alignment, CKA, rank, and what transforms explain.

    Args:
        blocks: the numbers of every block.
        kernels: the kernels by stage and block.
        change: the outputs' change (n, k).
        target: the labels (n, k); None if there are none.
        values: singular values of every block's weight change.
        squares: squared error and change by structure and block.
        plain: the names that blocks are told by.
        outputs: how many outputs the network has.
    """
    wide = [name for name, numbers in blocks.items() if min(numbers["shape"]) > 1 or numbers["shape"][0] == outputs]
    last = wide[-1] if wide and blocks[wide[-1]]["shape"][0] == outputs else None
    layers = layers_of([*blocks], last=last)
    starts = {name: _starts(blocks, [name]) for name in blocks}
    rows = []
    for layer in layers:
        others = [
            start for name in blocks if name not in layer.blocks and "lora_" not in name for start in starts[name]
        ]
        row = _row(layer, blocks, kernels, change, target, len(layers))
        row["blocks"] = [plain[name] for name in layer.blocks]
        own = [start for name in layer.blocks for start in starts[name]]
        row["start"] = "new" if new_head(layer.kind, own, others) else _start(layer, blocks, row, len(layers))
        joined = torch.cat([values[name].double() for name in layer.blocks])
        row["rank_90"], row["rank_most"] = rank_of(joined), sum(min(blocks[name]["shape"]) for name in layer.blocks)
        kept = {
            key: {name: pair for name, pair in pairs.items() if name in layer.blocks} for key, pairs in squares.items()
        }
        row["explain"] = {key: found["total"] for key, found in measures.r2_of(kept).items()}
        rows.append(row)
    return rows


def _starts(blocks: Mapping[str, Mapping[str, Any]], names: Sequence[str]) -> list[str | None]:
    """How the matrices among the blocks start."""
    return [blocks[name]["start"] for name in names if min(blocks[name]["shape"]) > 1]


def _start(layer: Layer, blocks: Mapping[str, Mapping[str, Any]], row: Mapping[str, Any], layers: int) -> str | None:
    starts = _starts(blocks, layer.blocks)
    if without_kernel(row["trace_share"], layers):
        return NO_KERNEL
    return ZERO if starts and ZERO in starts and all(start in (ZERO, NO_KERNEL) for start in starts) else None


def _row(
    layer: Layer, blocks: Mapping[str, Mapping[str, Any]], kernels: Mapping[str, Kernels], change: Tensor,
    target: Tensor | None, layers: int,
) -> dict[str, Any]:  # fmt: skip
    held = {stage: total({name: kernels[stage][name] for name in layer.blocks}) for stage in STAGES if stage in kernels}
    of = {stage: held.get(stage) for stage in STAGES}
    sums: dict[str, Any] = {key: _sum([blocks[name][key] for name in layer.blocks]) for key in _SUMMED}
    share = {stage: _sum([blocks[name]["trace_share"][stage] for name in layer.blocks]) for stage in STAGES}
    first = float(held["initial"].trace())
    grown = {s: float(held[s].trace()) / first if s in held and first > 0 else None for s in ("average", "final")}
    norms = [blocks[name]["change_norm"] for name in layer.blocks]
    return {
        "name": layer.name,
        "kind": layer.kind,
        **sums,
        "trace_share": share,
        "growth": dict.fromkeys(grown) if without_kernel(share, layers) else grown,
        "alignment": {s: defined(alignment, K, change) for s, K in of.items()},
        "alignment_centered": {s: defined(alignment, K, change, centered=True) for s, K in of.items()},
        "alignment_labels_centered": {s: defined(alignment, K, target, centered=True) for s, K in of.items()},
        "cka": defined(cka, of["initial"], of["final"]),
        "change_norm": sum(norm**2 for norm in norms) ** 0.5,
    }


def _sum(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None
