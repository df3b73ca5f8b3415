"""Networks whose layers do not see samples first: in windows, among tokens, sorted, or repeated."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from cases import normal
from real_cases import of, real


def windows(m: nn.Module, x: Tensor) -> Tensor:
    """Attention within windows of an image, which replace samples as the first dimension (Swin)."""
    n, h, w, _ = x.shape
    cut = x.unflatten(1, (h // 2, 2)).unflatten(3, (w // 2, 2)).transpose(2, 3).reshape(-1, 4, x.shape[-1])
    q, k, v = m.qkv(cut).chunk(3, -1)
    made = m.proj(torch.softmax(q @ k.mT, -1) @ v).reshape(n, h // 2, w // 2, 2, 2, -1).transpose(2, 3)
    return m.out((x + made.reshape(x.shape)).mean((1, 2)))


def pair_in_one_batch(m: nn.Module, a: Tensor, b: Tensor) -> Tensor:
    left, right = m.trunk(torch.cat([a, b])).chunk(2)
    return m.head((left - right).square())


def space_to_batch(m: nn.Module, x: Tensor) -> Tensor:
    corners = torch.cat([x[..., i::2, j::2] for i in (0, 1) for j in (0, 1)])
    return m.out(m.conv(corners).tanh().unflatten(0, (4, -1)).mean((0, -1, -2)))


def by_step(m: nn.Module, x: Tensor) -> Tensor:
    """A custom cell, called once per step."""
    h = x.new_zeros(len(x), 4)
    for step in x.unbind(1):
        h = torch.tanh(m.inner(step) + m.outer(h))
    return m.out(h)


def packed(m: nn.Module, x: Tensor, lengths: Tensor) -> Tensor:
    made = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    return m.out(m.rnn(made)[1][0][-1])


REARRANGED: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "tokens and samples as one dimension": lambda m, x: m.fc(x.transpose(0, 1).flatten(0, 1)).unflatten(
        0, (x.shape[1], -1)
    ).mean(0),
    "tokens in an order of their own": lambda m, x: (
        lambda rows, order: m.fc(rows[order])[order.argsort()].unflatten(0, x.shape[:2]).mean(1)
    )(x.flatten(0, 1), x.flatten(0, 1)[:, 0].argsort()),
    "tokens picked by each sample": lambda m, x: m.fc(x.take_along_dim(x.norm(dim=-1).topk(2).indices[..., None], 1)).mean(1),
    "tokens that pass a test": lambda m, x: torch.zeros_like(x).masked_scatter(
        x[..., :1] > 0, m.fc(x[x[..., 0] > 0]) if bool((x[..., 0] > 0).any()) else x[:0]
    ).mean(1),
    "samples several times over": lambda m, x: m.fc(x.repeat_interleave(3, 0) ** 2).unflatten(0, (-1, 3)).mean((1, 2)),
    "the whole batch repeated": lambda m, x: m.fc(x.repeat(3, 1, 1) ** 2).unflatten(0, (3, -1)).mean((0, 2)),
    "heads beside samples": lambda m, x: m.fc(x.repeat(1, 1, 2).unflatten(-1, (2, 4)).transpose(1, 2).flatten(0, 1)).sin(
    ).unflatten(0, (-1, 2)).mean((1, 2)),
    "chunks of the batch": lambda m, x: torch.cat([m.fc(part) for part in x.split(2)]).sin().mean(1),
    "one sample at a time": lambda m, x: torch.stack([m.fc(one).sin().mean(0) for one in x]),
    "samples reversed": lambda m, x: m.fc(x.flip(0)).sin().flip(0).mean(1),
}  # fmt: skip


def recurrent_twice(m: nn.Module, x: Tensor) -> Tensor:
    """One LSTM reads the tokens, then reads them backwards from its last state; the first state is learned."""
    start = tuple(state.expand(-1, len(x), -1).contiguous() for state in (m.h, m.c))
    _, state = m.rnn(x, start)
    return m.out(m.rnn(x.flip(1), state)[1][1][0])


def attention_twice(m: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
    """One attention layer used at two depths, tokens first, with some tokens masked."""
    x = x.transpose(0, 1)
    for _ in range(2):
        x = x + m.body(x, x, x, key_padding_mask=mask)[0]
    return m.out(x.mean(0))


def masked() -> tuple[Tensor, Tensor]:
    mask = torch.zeros(4, 4, dtype=torch.bool)
    mask[1, 2:] = mask[3, 3:] = True
    return normal(4, 4, 4), mask


def two_lookups(m: nn.Module, a: Tensor, b: Tensor) -> Tensor:
    return m.out(torch.cat([m.table(a), m.table(b).mean(1), m.table(b[:, :1] * 0).flatten(1)], 1).tanh())


CASES = (
    real("one index a sample", of(lambda m, x: m.out(m.table(x).tanh()), lambda: torch.randint(6, (5,)),
        table=lambda: nn.Embedding(6, 4), out=lambda: nn.Linear(4, 2))),
    real("a table read three times", of(two_lookups, lambda: (torch.randint(6, (4,)), torch.randint(6, (4, 3))),
        table=lambda: nn.Embedding(6, 4), out=lambda: nn.Linear(12, 2))),
    real("a table read in tokens first", of(lambda m, x: m.out(m.table(x.mT).tanh()).mean(0),
        lambda: torch.randint(6, (3, 3)), table=lambda: nn.Embedding(6, 4), out=lambda: nn.Linear(4, 2))),
    real("an LSTM called twice from a learned start", of(recurrent_twice, lambda: normal(4, 3, 3), h=lambda: normal(1, 1, 4),
        c=lambda: normal(1, 1, 4), rnn=lambda: nn.LSTM(3, 4, batch_first=True), out=lambda: nn.Linear(4, 2)), "h", "c"),
    real("MultiheadAttention twice, masked", of(attention_twice, masked, body=lambda: nn.MultiheadAttention(4, 2),
        out=lambda: nn.Linear(4, 2))),
    real("windows of an image", of(windows, lambda: normal(3, 4, 4, 3), qkv=lambda: nn.Linear(3, 9),
        proj=lambda: nn.Linear(3, 3), out=lambda: nn.Linear(3, 2)), "qkv.weight", "proj.weight"),
    real("two batches run as one", of(pair_in_one_batch, lambda: (normal(4, 3), normal(4, 3)),
        trunk=lambda: nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 3)), head=lambda: nn.Linear(3, 2)),
        "trunk.*"),
    real("parts of images beside samples", of(space_to_batch, lambda: normal(3, 2, 4, 4), conv=lambda: nn.Conv2d(2, 3, 2),
        out=lambda: nn.Linear(3, 2)), "conv.weight"),
    real("a recurrent cell of one's own", of(by_step, lambda: normal(4, 3, 3), inner=lambda: nn.Linear(3, 4),
        outer=lambda: nn.Linear(4, 4, bias=False), out=lambda: nn.Linear(4, 2))),
    real("LSTMCell and GRUCell", of(lambda m, x: m.out(m.gru(x[:, 1], m.lstm(x[:, 0])[0])), lambda: normal(4, 2, 3),
        lstm=lambda: nn.LSTMCell(3, 4), gru=lambda: nn.GRUCell(3, 4), out=lambda: nn.Linear(4, 2)), "lstm.*", "gru.*"),
    real("LSTM of packed sequences", of(packed, lambda: (normal(4, 5, 3), torch.tensor([3, 5, 1, 4])),
        rnn=lambda: nn.LSTM(3, 4, batch_first=True), out=lambda: nn.Linear(4, 2)), "rnn.*"),
    *(real(name, of(function, lambda: normal(4, 4, 4), fc=lambda: nn.Linear(4, 4)), "fc.weight")
        for name, function in REARRANGED.items()),
)  # fmt: skip
