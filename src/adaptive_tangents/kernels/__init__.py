"""Tangent kernels, tile by tile.

It makes kernels of a network in memory, reads any kernel by tiles, and has products, eigenvalues, operators and ridge
regression of kernels. It imports from sketching, capture, features, linalg and runtime.
"""

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
