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

from adaptive_tangents import transforms
from adaptive_tangents.alignment import (
    Decomposition,
    EffectiveRank,
    Representability,
    alignment,
    cka,
    decompose,
    effective_rank,
    representability,
)
from adaptive_tangents.blocks import Block
from adaptive_tangents.capture import tangent_features
from adaptive_tangents.errors import TangentError, TangentWarning
from adaptive_tangents.explain import Explanation, explain
from adaptive_tangents.features import TangentFeatures
from adaptive_tangents.induced import Composition, Induced, Penalty, shares
from adaptive_tangents.kernels import tangent_kernel
from adaptive_tangents.path import AverageFeatures, average_features
from adaptive_tangents.penalties import Absolute, LogSquared, NoAdaptation, Power, Quadratic
from adaptive_tangents.solvers import Fit, fit
from adaptive_tangents.structures import Fixed, Full, LayerScale, Left, Right, Structure, TwoSided

__version__ = "0.1.0"

__all__ = [
    "Absolute",
    "AverageFeatures",
    "Block",
    "Composition",
    "Decomposition",
    "EffectiveRank",
    "Explanation",
    "Fit",
    "Fixed",
    "Full",
    "Induced",
    "LayerScale",
    "Left",
    "LogSquared",
    "NoAdaptation",
    "Penalty",
    "Power",
    "Quadratic",
    "Representability",
    "Right",
    "Structure",
    "TangentError",
    "TangentFeatures",
    "TangentWarning",
    "TwoSided",
    "alignment",
    "average_features",
    "cka",
    "decompose",
    "effective_rank",
    "explain",
    "fit",
    "representability",
    "shares",
    "tangent_features",
    "tangent_kernel",
    "transforms",
]
