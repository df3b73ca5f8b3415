"""Positions that no output depends on are left out of a layer's signals, and nothing else is."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import adaptive_tangents as at
import reference
from adaptive_tangents.capture import live_positions
from adaptive_tangents.capture.capture import Capture
from adaptive_tangents.capture.live_positions import LiveGradients
from cases import Forward, normal

N, T, WORDS, WIDTH = 5, 12, 40, 6


def language_model(head: Callable[[nn.Module, Tensor, Tensor], Tensor], *, tied: bool) -> nn.Module:
    """Tokens, one layer that mixes them, and a head of their number, of which ``head`` picks outputs."""

    def forward(m: nn.Module, ids: Tensor) -> Tensor:
        h = m.tokens(ids)
        h = h + torch.tanh(m.mix(h.cumsum(1) / 4))
        return head(m, m.head(h), ids)

    torch.manual_seed(0)
    model = Forward(
        forward, tokens=nn.Embedding(WORDS, WIDTH), mix=nn.Linear(WIDTH, WIDTH), head=nn.Linear(WIDTH, WORDS, bias=not tied),
    )  # fmt: skip
    if tied:
        model.head.weight = model.tokens.weight
    return model.double()


HEADS: dict[str, Callable[[nn.Module, Tensor, Tensor], Tensor]] = {
    "the last token": lambda m, logits, ids: logits[:, -1, :4],
    "another place in each sample": lambda m, logits, ids: logits[torch.arange(len(ids)), ids[:, 0] % T, :4],
    "another place for each output": lambda m, logits, ids: torch.stack([logits[:, k, 3] for k in (2, 7, 2, 0)], 1),
    "one output that reads one place, and others that read all": lambda m, logits, ids: torch.cat(
        [logits[:, 3, :1], logits[..., :3].tanh().sum(1)], 1
    ),
    "nothing of some samples": lambda m, logits, ids: logits[:, 4, :4] * (ids[:, :1] % 2),
    "a word of each sample, looked up again": lambda m, logits, ids: m.tokens(ids)[:, 2, :4] * logits[:, 1, :4],
    "one output": lambda m, logits, ids: F.cross_entropy(logits[:, -1], ids[:, 0], reduction="none")[:, None],
}
PLACES = {"the last token": 1, "another place in each sample": 1, "another place for each output": 3, "one output": 1}


def ids() -> Tensor:
    return torch.randint(WORDS, (N, T), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("head", HEADS)
def test_features_are_exact_wherever_outputs_read(head: str, tied: bool) -> None:
    model, x = language_model(HEADS[head], tied=tied), ids()
    feats = at.tangent_features(model, x)
    phi = reference.jacobian(model, x)
    np.testing.assert_allclose(feats.dense().numpy(), phi, rtol=0, atol=1e-12)
    for outputs in ("full", "trace"):
        made = at.tangent_kernel(model, x, outputs=outputs, tile=2)
        np.testing.assert_allclose(made.numpy(), reference.kernel(phi, phi, outputs), rtol=0, atol=1e-10)
    block = feats.blocks["tokens" if tied else "head"]
    part = block.flipped if tied else block.outer
    assert part is not None
    assert part.backward.shape[1] == PLACES.get(head, part.backward.shape[1])
    sketched = at.Sketch(200, repetitions=2)
    assert torch.allclose(at.sketch_features(model, x, sketched).dense(), sketched.apply(feats).dense(), atol=1e-10)


def test_the_plan_counts_what_is_held() -> None:
    model, x = language_model(HEADS["the last token"], tied=True), ids()
    planned = Capture("features", model, x, None, None, None, None).bytes_per_sample
    assert planned * N == at.tangent_features(model, x).bytes
    assert planned < T * 4 * WORDS * 8  # all signals of the head


def test_outputs_that_come_all_at_once_are_narrowed_too() -> None:
    mask = 2.0 * (torch.arange(T) == 4).double()[:, None]
    model = Forward(lambda m, x: (m.fc(x) * mask).reshape(len(x), -1), fc=nn.Linear(3, 2))
    x = normal(N, T, 3)
    feats = at.tangent_features(model.double(), x)
    assert feats.c == 2 * T
    np.testing.assert_allclose(feats.dense().numpy(), reference.jacobian(model, x), rtol=0, atol=1e-12)
    assert feats.blocks["fc"].positions == 1


def test_without_this_the_features_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = language_model(HEADS["the last token"], tied=True), ids()
    few = at.tangent_features(model, x)
    monkeypatch.setattr(live_positions, "_WORTH", 10**6)
    every = at.tangent_features(model, x)
    assert few.blocks["tokens"].positions == T + 1
    assert every.blocks["tokens"].positions == 2 * T
    assert torch.allclose(few.dense(), every.dense(), atol=1e-14)


@pytest.mark.parametrize("most", [1, 3, 12])
def test_gradients_of_several_outputs_are_joined_where_any_is_not_zero(most: int) -> None:
    generator = torch.Generator().manual_seed(most)
    whole = torch.zeros(3, N, T, WIDTH)
    for k in range(N):
        for j in range(3):
            places = torch.randperm(most, generator=generator)[: 1 + (k + j) % most]
            whole[j, k, places] = torch.randn(len(places), WIDTH, generator=generator)
    live = LiveGradients((N, 3, 4, WIDTH))
    for gradient in whole:
        live.add(gradient.reshape(N, 3, 4, WIDTH))
    made, index = live.joined()
    if most == 12:
        assert index is None
        assert torch.equal(made, whole.reshape(3, N, 3, 4, WIDTH))
        return
    assert index is not None
    assert index.shape == (N, most)
    back = torch.zeros_like(whole)
    back[:, torch.arange(N)[:, None], index] = made
    assert torch.equal(back, whole)
    x = normal(N, 3, 4, 2)
    assert torch.equal(live_positions.at_positions(x, index, 2)[1], x.reshape(N, T, 2)[1, index[1]])
