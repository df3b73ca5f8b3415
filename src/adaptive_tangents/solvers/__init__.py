"""The exact adaptive model: coefficients and transform fitted together, with certificates."""

from adaptive_tangents.solvers.fit import certify, fit
from adaptive_tangents.solvers.model_selection import FitPath, fit_path, leave_one_out
from adaptive_tangents.solvers.proximal import ProximalFit, proximal_gradient
from adaptive_tangents.solvers.results import Fit, KernelFit, Round

__all__ = [
    "Fit",
    "FitPath",
    "KernelFit",
    "ProximalFit",
    "Round",
    "certify",
    "fit",
    "fit_path",
    "leave_one_out",
    "proximal_gradient",
]
