"""Attention in forward mode: values and both derivatives equal those of torch's elementary operations."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from adaptive_tangents.nn.forward_mode import Attended, forward_attention

Arguments = dict[str, object]


def parts(t: int = 5, s: int = 7, d: int = 4, e: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, *shape, dtype=torch.float64, generator=generator) for shape in ((t, d), (s, d), (s, e))]


CASES: dict[str, Callable[[], Arguments]] = {
    "plain": dict,
    "scaled": lambda: {"scale": 0.3},
    "causal": lambda: {"is_causal": True},
    "boolean mask": lambda: {"attn_mask": torch.arange(7) < torch.arange(1, 6)[:, None]},
    "additive mask": lambda: {"attn_mask": torch.linspace(-2, 1, 35).double().reshape(5, 7)},
    "mask of each sample": lambda: {
        "attn_mask": torch.zeros(2, 1, 1, 7).double().masked_fill(torch.arange(7) > 4, -math.inf)
    },
}


@pytest.mark.parametrize("moved", [(0, 1, 2), (0,), (2,), (1, 2)], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_attention_and_both_derivatives_are_those_of_the_elementary_operations(
    case: str, moved: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    apply = Attended.apply
    monkeypatch.setattr(Attended, "apply", lambda *given: calls.append(1) or apply(*given))
    generator = torch.Generator().manual_seed(1)
    tangents = [torch.randn(part.shape, dtype=torch.float64, generator=generator) for part in parts()]
    signal = torch.randn(2, 3, 5, 3, dtype=torch.float64, generator=generator)

    def both() -> tuple[Tensor, Tensor, list[Tensor]]:
        leaves = [part.requires_grad_(k in moved) for k, part in enumerate(parts())]
        with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
            given = [forward_ad.make_dual(leaf, tangents[k]) if k in moved else leaf for k, leaf in enumerate(leaves)]
            out = nn.functional.scaled_dot_product_attention(*given, **CASES[case]())  # type: ignore[arg-type]
            value, along = forward_ad.unpack_dual(out)
        back = torch.autograd.grad(value, [leaves[k] for k in moved], signal)
        return value.detach(), along.detach(), list(back)

    expected = both()
    with forward_attention():
        found = both()
    assert calls == [1]
    torch.testing.assert_close(found, expected)


def test_what_it_does_not_do_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Attended, "apply", lambda *given: pytest.fail("taken over"))
    query, key, value = parts()
    attention = nn.functional.scaled_dot_product_attention
    nothing = torch.ones(5, 7, dtype=torch.bool).index_fill_(0, torch.tensor(2), False)
    given: dict[str, tuple[list[Tensor], Arguments]] = {
        "dropout": ([query, key, value], {"dropout_p": 0.5}),
        "a row that attends to nothing": ([query, key, value], {"attn_mask": nothing}),
        "and by an additive mask": (
            [query, key, value],
            {"attn_mask": torch.zeros(5, 7).double().masked_fill(~nothing, -math.inf)},
        ),
        "grouped heads": ([query, key[:, :1], value[:, :1]], {"enable_gqa": True}),
        "broadcast heads": ([query, key[:, :1], value[:, :1]], {}),
        "half precision": ([query.bfloat16(), key.bfloat16(), value.bfloat16()], {}),
        "a learned mask": ([query, key, value], {"attn_mask": torch.zeros(5, 7).double().requires_grad_()}),
    }
    for name, (tensors, options) in given.items():
        torch.manual_seed(0)
        expected = attention(*tensors, **options)  # type: ignore[arg-type]
        torch.manual_seed(0)
        with forward_attention():
            found = nn.functional.scaled_dot_product_attention(*tensors, **options)  # type: ignore[arg-type]
        torch.testing.assert_close(found, expected, equal_nan=True, msg=name)
    assert nn.functional.scaled_dot_product_attention is attention
