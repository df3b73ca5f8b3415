"""Kernels on disk: planned, made in tiles by one process or several, resumed after a kill, read back."""

from adaptive_tangents.storage.kernel_to_store import kernel_to_store, plan_kernel
from adaptive_tangents.storage.store import KernelStore, open_kernel

__all__ = [
    "KernelStore",
    "kernel_to_store",
    "open_kernel",
    "plan_kernel",
]
