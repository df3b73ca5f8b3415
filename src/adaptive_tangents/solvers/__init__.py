"""The exact adaptive model: coefficients β and feature transform M fitted together, with certificates.

``fit`` solves it, from features or from kernels alone; ``certify`` checks given coefficients; ``fit_path`` and
``leave_one_out`` choose among structures and ridges; ``proximal_gradient`` is an independent first-order check;
``load_fit`` reads what ``Fit.save`` wrote.
"""

from adaptive_tangents.solvers.fit import certify, fit
from adaptive_tangents.solvers.model_selection import FitPath, fit_path, leave_one_out
from adaptive_tangents.solvers.proximal import ProximalFit, proximal_gradient
from adaptive_tangents.solvers.results import Fit, KernelFit, Round, load_fit

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
    "load_fit",
    "proximal_gradient",
]
