"""Kernels on disk.

It plans them, makes them tile by tile with one process or several, resumes them after a kill, and reads them back. It
imports from kernels, capture, features and runtime.
"""

from adaptive_tangents.storage.kernel_to_store import kernel_to_store, plan_kernel
from adaptive_tangents.storage.store import KernelStore, open_kernel

__all__ = [
    "KernelStore",
    "kernel_to_store",
    "open_kernel",
    "plan_kernel",
]
