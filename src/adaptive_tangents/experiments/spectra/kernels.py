"""Which eigenvalues and eigenvectors of the tangent kernel does training change, and does the exact model do the same?

The problem is that of kernel-alignment: students of a teacher's smooth output and of its sign, on digits 2 and 3. The kernels
are the initial K_0, the path average K̄, the final K_T, and K_M of the exact two-sided model. Measured are their spectra as
shares of the trace; the leading eigenvectors of the centered kernels HKH, H = I − 11ᵀ/n, and their share of the target; and
the diagonals. Centering matters: a ReLU network's features share a mean, so the first eigenvector of K is nearly constant.
Source: LeJeune & Alemohammad, CPAL 2024, §4 and figures 3-4; arXiv:2308.15478, first versions (spectra).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from adaptive_tangents.capture.capture import tangent_features
from adaptive_tangents.capture.path_average import average_features
from adaptive_tangents.errors import TangentError
from adaptive_tangents.experiments.claims import over_seeds, rank_correlation
from adaptive_tangents.experiments.kernel_alignment.measures import Checkpoint, outputs
from adaptive_tangents.experiments.kernel_alignment.setup import (
    Problem,
    TeacherTask,
    asked_fields,
    config_dict,
    problem,
    student,
    trained,
)
from adaptive_tangents.experiments.spectra import KERNELS as NAME
from adaptive_tangents.experiments.spectra.claims import kernel_claims
from adaptive_tangents.experiments.study import Asked
from adaptive_tangents.measures.alignment import effective_rank
from adaptive_tangents.penalties.closed_forms import Quadratic
from adaptive_tangents.runs.record import Clock, RunResult, heading
from adaptive_tangents.runs.units import Units
from adaptive_tangents.runtime.progress import Progress, silent
from adaptive_tangents.solvers.fit import fit
from adaptive_tangents.structures.spectral import TwoSided

TARGETS = ("smooth", "sign")
KERNELS = ("initial", "average", "final", "adapted")
# The number of leading eigenvectors in the figures, and the number whose energy is reported.
SHOWN, TOP = 3, 10

# Expected work of each stage, in seconds on one core with the default config; only ratios matter.
_WORK = {"data": 1.0, "train": 12.0, "kernels": 12.0}


@dataclass(frozen=True)
class KernelSpectraConfig(TeacherTask):
    """Settings: the problem, and λ of the exact model's penalty on both sides."""

    experiment: ClassVar[str] = NAME

    seeds: int = 3
    path_nodes: int = 24
    strength: float = 1.0
    max_rounds: int = 200


def configured(asked: Asked) -> KernelSpectraConfig:
    """The settings for what the command line asked."""
    config = KernelSpectraConfig(**asked_fields(asked, standard=3, full=5))
    return replace(config, path_nodes=12) if asked.size == "quick" else config


def run(
    config: KernelSpectraConfig,
    *,
    device: str = "cpu",
    progress: Progress = silent,
    units: Units | None = None,
) -> RunResult:
    """Train the students and decompose their kernels; trainings and decompositions are parts of the run.

    Raises TangentError if the data are not available or hold too few digits, or if training diverges.

    >>> from adaptive_tangents.experiments.training import SGD
    >>> config = KernelSpectraConfig(seeds=1, width=6, training=SGD(epochs=1), kernel_samples=16, path_nodes=2)
    >>> list(run(config).results["targets"]["sign"]["share"])
    ['initial', 'average', 'final', 'adapted']
    """
    clock = Clock(progress, config.seeds * (_WORK["data"] + len(TARGETS) * (_WORK["train"] + _WORK["kernels"])))
    units = units or Units()
    runs: list[dict[str, Any]] = []
    arrays: dict[str, list[np.ndarray]] = {}
    for seed in range(config.seed, config.seed + config.seeds):
        each, prefix = replace(config, seed=seed), f"seed{seed}."
        with clock.stage(f"{prefix}data", _WORK["data"]):
            posed = problem(each, device)
        runs.append({})
        for name in TARGETS:
            with clock.stage(f"{prefix}{name}.train", _WORK["train"]) as advance:
                y = posed.targets[name]
                start, end, _ = trained(each, name, y, posed, units, advance, device, prefix=prefix)
            with clock.stage(f"{prefix}{name}.kernels", _WORK["kernels"]):
                found = units(f"{prefix}{name}.kernels", _decomposer(each, name, posed, start, end, device))
            for key, value in found.items():
                arrays.setdefault(f"{name}.{key}", []).append(value.cpu().numpy())
            runs[-1][name] = measures(found)
    seeds = over_seeds(runs)
    results = {
        **heading(NAME, config_dict(config), clock, device),
        "seed": config.seed,
        "data": posed.data,
        "kernels": list(KERNELS),
        "targets": runs[0],
        "over_seeds": seeds,
        "claims": kernel_claims(seeds),
        "metrics": {key: float(np.mean(values)) for key, values in seeds.items()},
    }
    return RunResult(results, {key: np.stack(values) for key, values in arrays.items()})


def _decomposer(
    config: KernelSpectraConfig, name: str, posed: Problem, start: Checkpoint, end: Checkpoint, device: str
) -> Callable[[], dict[str, Tensor]]:
    """A function that decomposes the four kernels of one student."""

    def make() -> dict[str, Tensor]:
        model, x = student(config, posed, device), posed.x[posed.chosen]
        y = posed.targets[name][posed.chosen]
        initial = tangent_features(model, x, params=start)
        average = average_features(model, start, end, x, nodes=config.path_nodes)
        structure = TwoSided(Quadratic(config.strength))
        exact = fit(initial, y - outputs(model, start, x), structure=structure, max_rounds=config.max_rounds)
        feats = {
            "initial": initial,
            "average": average,
            "final": tangent_features(model, x, params=end),
            "adapted": exact.transform(initial),
        }
        made = {
            "target": y[:, 0],
            "teacher": posed.targets["smooth"][posed.chosen, 0],
            "path_error_db": torch.tensor([average.error_db]),
        }
        for kind, of in feats.items():
            parts = decomposed(of.kernel(outputs="trace"), y[:, 0])
            made |= {f"{kind}.{key}": value for key, value in parts.items()}
        return made

    return make


def decomposed(kernel: Float[Tensor, "n n"], y: Float[Tensor, " n"]) -> dict[str, Tensor]:
    """A kernel's spectrum, plain and centered, as shares of the trace; leading eigenvectors; energies of y; diagonal.

    ``energy`` (n,) is the share of ‖Hy‖² in the first 1, 2, … eigenvectors of HKH; ``vectors`` (SHOWN, n) are the first of
    them, with unit root mean square and the sign that correlates with y.

    >>> found = decomposed(torch.tensor([[2.0, -2.0], [-2.0, 2.0]]), torch.tensor([1.0, -1.0]))
    >>> [round(share, 6) for share in found["centred"].tolist()], round(float(found["energy"][0]), 6)
    ([1.0, 0.0], 1.0)
    """
    kernel, y = kernel.double(), y.double()
    n = len(y)
    if not bool((y != y[0]).any()):
        raise TangentError(f"{NAME}: the target has one value on all {n} samples; use more samples")
    centered = kernel - kernel.mean(0, keepdim=True)
    centered = centered - centered.mean(1, keepdim=True)
    values, vectors = torch.linalg.eigh(centered)
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    along = vectors.mT @ (y - y.mean())
    plain = torch.linalg.eigvalsh(kernel).flip(0).clamp_min(0)
    signs = torch.where(along[:SHOWN] < 0, -1.0, 1.0).to(vectors)
    return {
        "spectrum": plain / plain.sum(),
        "centred": values / values.sum(),
        "energy": (along**2).cumsum(0) / (along**2).sum(),
        "vectors": (vectors[:, :SHOWN] * signs).mT * n**0.5,
        "diagonal": kernel.diagonal().clone(),
    }


def measures(found: Mapping[str, Tensor]) -> dict[str, Any]:
    """The numbers of one student that the claims are about."""
    distance = found["teacher"].abs().cpu().numpy()
    diagonals = {kind: found[f"{kind}.diagonal"].cpu().numpy() for kind in KERNELS}
    energy = {kind: found[f"{kind}.energy"] for kind in KERNELS}
    return {
        "share": {kind: float(found[f"{kind}.centred"][0]) for kind in KERNELS},
        "share_plain": {kind: float(found[f"{kind}.spectrum"][0]) for kind in KERNELS},
        "rank": {kind: effective_rank(found[f"{kind}.spectrum"]).entropy for kind in KERNELS},
        "leading": {kind: float(energy[kind][0]) for kind in KERNELS},
        "top": {kind: float(energy[kind][min(TOP, len(energy[kind])) - 1]) for kind in KERNELS},
        "distance": {kind: rank_correlation(diagonals[kind], distance) for kind in KERNELS},
        "diagonal": {kind: rank_correlation(diagonals[kind], diagonals["initial"]) for kind in KERNELS[1:]},
        "path_error_db": float(found["path_error_db"][0]),
    }
