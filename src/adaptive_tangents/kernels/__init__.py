"""Tangent kernels by tiles: made from a network, seen as operators, and used for regression."""

from adaptive_tangents.kernels.eigen import KernelEigen, kernel_eigen
from adaptive_tangents.kernels.regression import KernelRegression, kernel_regression
from adaptive_tangents.kernels.tangent_kernel import tangent_kernel
from adaptive_tangents.kernels.tiles import KernelBlock, SharedKernel

__all__ = [
    "KernelBlock",
    "KernelEigen",
    "KernelRegression",
    "SharedKernel",
    "kernel_eigen",
    "kernel_regression",
    "tangent_kernel",
]
