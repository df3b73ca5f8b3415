"""Whether a resumed run has the network of the run before: by its outputs, and by derivatives, which these do not show."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from adaptive_tangents.capture.batches import Batch, samples, take
from adaptive_tangents.errors import TangentError
from adaptive_tangents.inspection.kept import Kept, Record
from adaptive_tangents.inspection.tangents import Tangents

_FEW = 4  # samples whose derivatives are kept
_DRAWN = 2  # products with random vectors, for each block
_PREFIX = "mark "
# Relative to the largest output, or to all derivatives: other networks differ by more, the same one in a like place by less.
_ROUNDING = {torch.float64: 1e-9, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
_ELSEWHERE, _DERIVED_ELSEWHERE = 1e-3, 1e-2


def place_of(value: Tensor) -> dict[str, str | int]:
    """Where a run computes, and so how it rounds: the device, its kind, and the threads."""
    gpu = value.device.type == "cuda"
    kind = torch.cuda.get_device_name(value.device) if gpu else torch.backends.cpu.get_cpu_capability()
    return {"device": value.device.type, "kind": kind, "threads": torch.get_num_threads()}


def outputs_before(outputs: Sequence[Tensor], before: Record, kept: Kept) -> list[Tensor]:
    """The outputs of the run before, to the last bit; raises TangentError if the network computes something else now."""
    stored = [before.tensors[f"{k}"].to(out.device) for k, out in enumerate(outputs)]
    size = max(float(out.abs().max()) for out in stored)
    for now, then in zip(outputs, stored, strict=True):
        allowed = _allowed(now, before, _ELSEWHERE) * size
        if now.shape != then.shape or now.dtype != then.dtype or float((now - then).abs().max()) > allowed:
            raise TangentError(
                f"inspect: the network's outputs are not those of the run that {kept} holds stages of; give the same "
                "network, run without --resume, or give another folder with --out"
            )
    return stored


def marked(
    tangents: Tangents, ends: Mapping[str, Mapping[str, Tensor]], count: int | None = None
) -> tuple[int, dict[str, Float[Tensor, "_blocks _numbers"]]]:
    """A few numbers of every block's derivatives on a few samples at some states, and how many samples these are.

    Of the derivatives' sum with random weights, a matrix for each block, they are products with random vectors and the norm.
    """
    n = samples(tangents.x)
    count = max(1, min(_FEW, n, tangents.limit // tangents.making)) if count is None else count
    few = take(tangents.x, torch.linspace(0, n - 1, count, device="cpu").long())
    return count, {f"{_PREFIX}{end}": _mark(tangents, few, state) for end, state in ends.items()}


def check_marks(tangents: Tangents, ends: Mapping[str, Mapping[str, Tensor]], before: Record, kept: Kept) -> None:
    """Raise TangentError where derivatives are not those of the run before."""
    if "marked" not in before.numbers:  # by an earlier version
        return
    _, now = marked(tangents, ends, int(before.numbers["marked"]))
    names = before.numbers["blocks"]
    for key, found in now.items():
        then = before.tensors[key]
        size = float(then[:, -1].norm())
        off = (found - then).abs().amax(1) if found.shape == then.shape else torch.full((1,), torch.inf, device="cpu")
        allowed = _allowed(next(tangents.model.parameters()), before, _DERIVED_ELSEWHERE)
        if not float(off.max()) <= allowed * size:
            raise TangentError(
                f"inspect: the network's derivatives at the {key.removeprefix(_PREFIX)} are not those of the run that {kept} "
                f"holds stages of (most in {names[int(off.argmax())]}), though its outputs are: its code has changed; give "
                "the same network, run without --resume, or give another folder with --out"
            )


def _allowed(value: Tensor, before: Record, elsewhere: float) -> float:
    """The relative difference that rounding may make."""
    known = {key: before.numbers.get(key) for key in place_of(value)}
    rounding = _ROUNDING.get(value.dtype.to_real(), elsewhere)
    halved = value.is_cuda and (torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32)
    return rounding if known == place_of(value) and not halved else max(rounding, elsewhere)


def _mark(tangents: Tangents, few: Batch, state: Mapping[str, Tensor]) -> Float[Tensor, "_blocks _numbers"]:
    feats = tangents.of(few, state)
    drawn = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=drawn, dtype=torch.float64, device="cpu").to(feats.device)

    weights, rows = normal(feats.n, feats.c), list[Tensor]()
    for block in feats.blocks.values():
        matrix = block.map(dtype=torch.float64).combine(weights)
        left, right = normal(_DRAWN, matrix.shape[0]), normal(matrix.shape[1], _DRAWN)
        rows.append(torch.cat([(left @ matrix @ right).diagonal(), matrix.norm()[None]]))
    return torch.stack(rows).cpu()
