"""Forward mode where torch lacks it or gets it wrong: attention, S dV + dS V, and lookups with a padding row."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd import forward_ad

Queries = Float[Tensor, "*h t d"]
Keys = Float[Tensor, "*h s d"]
Values = Float[Tensor, "*h s e"]
Attention = Float[Tensor, "*h t e"]


@contextmanager
def forward_attention() -> Iterator[None]:
    """Within this context, scaled_dot_product_attention is ``Attended``, unless it has dropout or grouped heads."""
    original = nn.functional.scaled_dot_product_attention

    def attention(*args: Any, **options: Any) -> Tensor:
        made = _attended(*args, **options)
        if made is None:
            made = original(*args, **options)
        return made

    nn.functional.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        nn.functional.scaled_dot_product_attention = original


@contextmanager
def forward_lookups() -> Iterator[None]:
    """Within this context, a table's padding row has no tangent, as it has no gradient; torch's forward mode gives it one."""
    original = torch.embedding

    def lookup(weight: Tensor, indices: Tensor, padding_idx: int = -1, *rest: Any, **options: Any) -> Tensor:
        found: Tensor = original(weight, indices, padding_idx, *rest, **options)
        if padding_idx < 0:
            return found
        still = forward_ad.unpack_dual(found).primal  # type: ignore[no-untyped-call]
        return torch.where((indices == padding_idx)[..., None], still, found)

    torch.embedding = lookup  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.embedding = original


def _attended(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor | None:  # fmt: skip
    if dropout_p > 0 or enable_gqa or query.dtype not in (torch.float32, torch.float64):
        return None
    if query.shape[:-2] != key.shape[:-2] or key.shape[:-2] != value.shape[:-2]:
        return None
    if attn_mask is not None and (is_causal or attn_mask.requires_grad):
        return None
    mask = attn_mask
    if is_causal:
        mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
    if mask is not None and mask.dtype == torch.bool:
        # Only the original handles a row that attends to nothing.
        if not bool(mask.any(-1).all()):
            return None
        mask = torch.zeros(mask.shape, dtype=query.dtype, device=mask.device).masked_fill_(~mask, -math.inf)
    elif mask is not None and not bool((mask > -math.inf).any(-1).all()):
        return None
    made: Tensor = Attended.apply(query, key, value, mask, 1 / math.sqrt(query.shape[-1]) if scale is None else scale)  # type: ignore[no-untyped-call]
    return made


class Attended(torch.autograd.Function):
    """softmax(sQKᵀ + mask) V, with a first derivative in forward and in reverse mode."""

    @staticmethod
    def forward(ctx: Any, query: Queries, key: Keys, value: Values, mask: Tensor | None, scale: float) -> Attention:
        scores = (query * scale) @ key.mT
        ctx.scale, ctx.weights = scale, (scores if mask is None else scores + mask).softmax(-1)
        ctx.save_for_backward(query, key, value)
        ctx.save_for_forward(query, key, value)
        attended: Tensor = ctx.weights @ value
        return attended

    @staticmethod
    @torch.no_grad()
    def jvp(ctx: Any, query_moved: Queries, key_moved: Keys, value_moved: Values, *_: Any) -> Attention:
        """S dV + dS V, where each row of dS is S∘(dA − ⟨S, dA⟩), dA = s(dQ Kᵀ + Q dKᵀ); absent tangents are zero."""
        query, key, value = ctx.saved_tensors
        scores = ctx.scale * torch.cat([query_moved, query], -1) @ torch.cat([key, key_moved], -1).mT
        moved = ctx.weights * scores
        moved -= ctx.weights * moved.sum(-1, keepdim=True)
        attended: Tensor = torch.cat([ctx.weights, moved], -1) @ torch.cat([value_moved, value], -2)
        return attended

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, signal: Attention) -> tuple[Tensor | None, ...]:
        """The gradient is Sᵀg for V, and S∘(gVᵀ − ⟨S, gVᵀ⟩) for each row of the scores."""
        query, key, value = ctx.saved_tensors
        back = ctx.weights * (signal @ value.mT)
        back -= ctx.weights * back.sum(-1, keepdim=True)
        back *= ctx.scale
        return back @ key, back.mT @ query, ctx.weights.mT @ signal, None, None
