"""How a network's tangent features change when it learns, and the exact model of that change.

The public names, in the order data flows: a model and a batch become tangent features, at one set of parameters or
averaged along a path; features give kernels; penalties and structures say how features may be transformed; ``fit`` solves
for coefficients and transform together; measures compare kernels with targets and features with features.

>>> import torch, adaptive_tangents as at
>>> model = torch.nn.Sequential(torch.nn.Linear(4, 32), torch.nn.ReLU(), torch.nn.Linear(32, 1))
>>> x, y = torch.randn(30, 4), torch.randn(30, 1)
>>> feats = at.tangent_features(model, x)
>>> fit = at.fit(feats, y - model(x).detach(), structure=at.TwoSided(at.Quadratic(0.1)))
>>> fit.converged
True
>>> at.alignment(fit.transform(feats).kernel(), y) > at.alignment(feats.kernel(), y)
True
"""

from adaptive_tangents._version import __version__ as __version__
from adaptive_tangents.capture.capture import tangent_features
from adaptive_tangents.capture.path_average import AverageFeatures, average_features
from adaptive_tangents.errors import TangentError, TangentWarning
from adaptive_tangents.features import transforms
from adaptive_tangents.features.blocks import Block
from adaptive_tangents.features.tangent_features import TangentFeatures
from adaptive_tangents.kernels.operators import KernelEigen, KernelOperator, kernel_eigen, kernel_operator
from adaptive_tangents.kernels.regression import KernelRegression, kernel_regression
from adaptive_tangents.kernels.tangent_kernel import tangent_kernel
from adaptive_tangents.kernels.tiles import KernelBlock, SharedKernel
from adaptive_tangents.measures import kernel_change as adaptation
from adaptive_tangents.measures.alignment import (
    Decomposition,
    EffectiveRank,
    Representability,
    alignment,
    cka,
    decompose,
    effective_rank,
    representability,
)
from adaptive_tangents.measures.explain import Explanation, explain
from adaptive_tangents.measures.kernel_change import KernelChange, KernelPart, kernel_change
from adaptive_tangents.nn.tangent_module import TangentModule
from adaptive_tangents.penalties.closed_forms import Absolute, LogSquared, NoAdaptation, Power, Quadratic
from adaptive_tangents.penalties.penalty import Composition, Induced, Penalty, shares
from adaptive_tangents.sketching.sketch_files import append_sketch, load_sketch, save_sketch
from adaptive_tangents.sketching.sketches import (
    Sketch,
    SketchedFeatures,
    SketchedKernel,
    SketchedMeasure,
    sketch_features,
)
from adaptive_tangents.solvers.fit import certify, fit
from adaptive_tangents.solvers.model_selection import FitPath, fit_path, leave_one_out
from adaptive_tangents.solvers.proximal import ProximalFit, proximal_gradient
from adaptive_tangents.solvers.results import Fit, KernelFit, Round
from adaptive_tangents.storage.kernel_to_store import kernel_to_store, plan_kernel
from adaptive_tangents.storage.store import KernelStore, open_kernel
from adaptive_tangents.structures.base import BlockSolution, BlockStructure, Fixed, Full, Solution, Structure
from adaptive_tangents.structures.grouped import Columns, Diagonal, LayerScale, Rows
from adaptive_tangents.structures.mixed import Mixed
from adaptive_tangents.structures.modes import Modes
from adaptive_tangents.structures.spectral import Left, Right, TwoSided

__all__ = [
    "Absolute",
    "AverageFeatures",
    "Block",
    "BlockSolution",
    "BlockStructure",
    "Columns",
    "Composition",
    "Decomposition",
    "Diagonal",
    "EffectiveRank",
    "Explanation",
    "Fit",
    "FitPath",
    "Fixed",
    "Full",
    "Induced",
    "KernelBlock",
    "KernelChange",
    "KernelEigen",
    "KernelFit",
    "KernelOperator",
    "KernelPart",
    "KernelRegression",
    "KernelStore",
    "LayerScale",
    "Left",
    "LogSquared",
    "Mixed",
    "Modes",
    "NoAdaptation",
    "Penalty",
    "Power",
    "ProximalFit",
    "Quadratic",
    "Representability",
    "Right",
    "Round",
    "Rows",
    "SharedKernel",
    "Sketch",
    "SketchedFeatures",
    "SketchedKernel",
    "SketchedMeasure",
    "Solution",
    "Structure",
    "TangentError",
    "TangentFeatures",
    "TangentModule",
    "TangentWarning",
    "TwoSided",
    "adaptation",
    "alignment",
    "append_sketch",
    "average_features",
    "certify",
    "cka",
    "decompose",
    "effective_rank",
    "explain",
    "fit",
    "fit_path",
    "kernel_change",
    "kernel_eigen",
    "kernel_operator",
    "kernel_regression",
    "kernel_to_store",
    "leave_one_out",
    "load_sketch",
    "open_kernel",
    "plan_kernel",
    "proximal_gradient",
    "representability",
    "save_sketch",
    "shares",
    "sketch_features",
    "tangent_features",
    "tangent_kernel",
    "transforms",
]
