"""Measures that compare kernels with targets, kernels with kernels, and features with features.

``alignment``, ``cka``, ``decompose``, ``representability`` and ``effective_rank`` take kernels or matrices. ``kernel_change``
splits the change of a kernel under given transforms by block and side; ``explain`` asks how much of a measured feature
change a structure of transforms can explain. ``lora_advice`` gives the ranks of adapters that hold a change of weights.
"""

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
from adaptive_tangents.measures.explain import Explanation, explain, load_explanation
from adaptive_tangents.measures.kernel_change import KernelChange, KernelPart, kernel_change
from adaptive_tangents.measures.lora_advice import LoraAdvice, LoraLayer, lora_advice

__all__ = [
    "Decomposition",
    "EffectiveRank",
    "Explanation",
    "KernelChange",
    "KernelPart",
    "LoraAdvice",
    "LoraLayer",
    "Representability",
    "alignment",
    "cka",
    "decompose",
    "effective_rank",
    "explain",
    "kernel_change",
    "load_explanation",
    "lora_advice",
    "representability",
]
