"""Let torchvision be imported where its build does not match torch's, in processes that start with this folder on their path.

Such a torchvision fails to import, and transformers, peft and lightning with it. No test calls its operators.
"""

import importlib.abc
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


class _Declares(importlib.abc.MetaPathFinder):
    """Declares the operators just before the first import of torchvision."""

    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if name == "torchvision":
            sys.meta_path.remove(self)
            declare_operators()
        return None


def declare_operators() -> None:
    import ctypes
    from pathlib import Path

    import torch
    from torch import library

    found = importlib.util.find_spec("torchvision")
    if torch.version.cuda is not None or found is None:
        return
    try:
        ctypes.CDLL(str(Path(found.origin or "").with_name("_C.so")))
    except OSError:
        if hasattr(torch.ops.torchvision, "nms"):  # declared before
            return
        for operator in ("nms", "qnms"):
            library.define(f"torchvision::{operator}", "(Tensor dets, Tensor scores, float threshold) -> Tensor")


sys.meta_path.insert(0, _Declares())
