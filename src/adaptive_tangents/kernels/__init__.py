"""Tangent kernels by tiles: made from a network, seen as operators, and used for regression."""

from adaptive_tangents.kernels.operators import KernelEigen, KernelOperator, kernel_eigen, kernel_operator
from adaptive_tangents.kernels.regression import KernelRegression, kernel_regression
from adaptive_tangents.kernels.tangent_kernel import tangent_kernel
from adaptive_tangents.kernels.tiles import KernelBlock, SharedKernel

__all__ = [
    "KernelBlock",
    "KernelEigen",
    "KernelOperator",
    "KernelRegression",
    "SharedKernel",
    "kernel_eigen",
    "kernel_operator",
    "kernel_regression",
    "tangent_kernel",
]
