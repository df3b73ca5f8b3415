"""Datasets and loaders of torch give samples: as many as asked for, padded by their own collate function, nothing moved."""

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, TensorDataset

from adaptive_tangents.errors import TangentError
from adaptive_tangents.loading import Data, as_data

X = torch.arange(30.0).reshape(10, 3)
Y = torch.arange(10) % 3


class Items(Dataset[Any]):
    """Samples as a list, each used as often as asked for."""

    def __init__(self, items: list[Any]) -> None:
        self.items, self.asked = items, 0

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, k: int) -> Any:
        self.asked += 1
        random.random(), np.random.rand(), torch.rand(1)  # noqa: NPY002
        return self.items[k]


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        k = 0
        while True:
            yield X[k % 10], Y[k % 10]
            k += 1


def dicts() -> list[dict[str, Any]]:
    return [{"input_ids": torch.arange(1, 2 + k % 4), "labels": int(Y[k]), "idx": f"row {k}"} for k in range(10)]


def padded(items: list[dict[str, Any]]) -> dict[str, Tensor]:
    ids = nn.utils.rnn.pad_sequence([item["input_ids"] for item in items], batch_first=True)
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": torch.tensor([i["labels"] for i in items])}


def states() -> list[Any]:
    return [torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()]  # type: ignore[index]  # noqa: NPY002


PAIRS: dict[str, Callable[[], Any]] = {
    "a pair": lambda: (X, Y),
    "arrays": lambda: (X.numpy(), Y.numpy()),
    "a list of labels": lambda: (X, Y.tolist()),
    "a TensorDataset": lambda: TensorDataset(X, Y),
    "a Dataset of pairs": lambda: Items([(X[k], int(Y[k])) for k in range(10)]),
    "a Dataset of dicts": lambda: Items([{"x": X[k], "label": Y[k]} for k in range(10)]),
    "a DataLoader": lambda: DataLoader(TensorDataset(X, Y), batch_size=4),
    "a DataLoader of single samples": lambda: DataLoader(TensorDataset(X, Y), batch_size=None),
    "a DataLoader of a Dataset's batches": lambda: DataLoader(Items([(X[:4], Y[:4]), (X[4:], Y[4:])]), batch_size=None),
    "a dict with labels": lambda: {"x": X, "labels": Y},
    "data": lambda: Data(X, Y),
}


@pytest.mark.parametrize("kind", PAIRS)
def test_inputs_and_labels_are_found(kind: str) -> None:
    found = as_data(PAIRS[kind]())
    x = found.x["x"] if isinstance(found.x, dict) else found.x
    assert torch.equal(torch.as_tensor(x), X)
    assert found.y is not None
    assert torch.equal(found.y, Y)


def test_labels_in_a_batch_are_not_passed_to_the_network() -> None:
    found = as_data(DataLoader(Items(dicts()), batch_size=3, collate_fn=padded))
    assert isinstance(found.x, dict)
    assert list(found.x) == ["input_ids", "attention_mask"]


def test_samples_of_several_batches_are_padded_alike_by_the_collate_function() -> None:
    found = as_data(DataLoader(Items(dicts()), batch_size=2, collate_fn=padded), most=7)
    assert isinstance(found.x, dict)
    assert found.x["input_ids"].shape == (7, 4)
    assert torch.equal(found.x["attention_mask"].sum(1), torch.arange(7) % 4 + 1)
    assert any("the first 7 of the 10 samples" in note for note in found.notes)


def test_only_as_many_samples_are_made_as_asked_for() -> None:
    items = Items([(X[k], Y[k]) for k in range(10)])
    assert as_data(DataLoader(items, batch_size=4), most=3).n == 3
    assert items.asked == 3
    assert as_data(items, most=4, seed=1).n == 4
    assert items.asked == 7


@pytest.mark.parametrize("given", ["shuffle", "generator", "sampler"])
def test_shuffling_moves_no_random_numbers_of_the_user(given: str) -> None:
    data, own = Items([(X[k], Y[k]) for k in range(10)]), torch.Generator().manual_seed(5)
    loader: Any = {
        "shuffle": lambda: DataLoader(data, batch_size=4, shuffle=True),
        "generator": lambda: DataLoader(data, batch_size=4, shuffle=True, generator=own),
        "sampler": lambda: DataLoader(data, batch_size=4, sampler=RandomSampler(data, generator=own)),
    }[given]()
    before, state = states(), own.get_state()
    found = as_data(loader, most=6)
    assert states() == before
    assert torch.equal(own.get_state(), state)
    again = as_data(loader, most=6)
    assert torch.equal(torch.as_tensor(found.x), torch.as_tensor(again.x))
    assert not torch.equal(torch.as_tensor(found.x), X[:6])  # shuffled indeed


def test_streams_without_an_end_need_a_bound() -> None:
    assert as_data(Endless(), most=5).n == 5
    assert as_data(DataLoader(Endless(), batch_size=2), most=5).n == 5
    for endless in (Endless(), DataLoader(Endless(), batch_size=2)):
        with pytest.raises(TangentError, match="a stream without an end; say how many samples to take with most="):
            as_data(endless)


def test_names_as_labels_are_numbered() -> None:
    found = as_data(Items([(X[k], "ab"[k % 2]) for k in range(10)]), classes=("b", "a"))
    assert found.y is not None
    assert found.y.tolist() == [1, 0] * 5
    assert as_data(["a text", "two"], tokenizer=lambda texts: {"ids": torch.ones(len(texts), 2)}).texts == (
        "a text",
        "two",
    )
    pair = as_data((["a text", "two"], ["b", "a"]), tokenizer=lambda texts: {"ids": torch.ones(len(texts), 2)})
    assert pair.y is not None
    assert pair.y.tolist() == [1, 0]


def test_held_out_things_are_marked() -> None:
    found = as_data((X[:6], Y[:6]), held_out=TensorDataset(X[6:], Y[6:]))
    assert found.held_out is not None
    assert found.held_out.tolist() == [False] * 6 + [True] * 4
    assert torch.equal(torch.as_tensor(found.x), X)


REFUSED: dict[str, tuple[Callable[[], Any], dict[str, Any], str]] = {
    "several lengths": (lambda: Items([(torch.ones(k + 1), 0) for k in (0, 1)]), {}, "form a batch .*collate_fn pads"),
    "three things": (lambda: TensorDataset(X, X, Y), {}, "gives 3 things a sample, and nothing says which are labels"),
    "no samples": (lambda: Items([]), {}, "holds no samples"),
    "labels alone": (lambda: {"labels": Y}, {}, "gives no tensors beside labels"),
    "labels of another number": (lambda: (X, Y[:4]), {}, "x holds 10 samples and y 4"),
    "a label beyond the outputs": (lambda: (X, Y), {"classes": ("a", "b")}, "the label 2, but the network has 2 classes"),
    "a negative label": (lambda: (X, Y - 1), {"classes": ("a", "b")}, "holds the label -1"),
    "a number": (lambda: 3, {}, "data are a path, a batch x, .*; got int"),
    "a bound of zero": (lambda: TensorDataset(X, Y), {"most": 0}, "most must be at least 1"),
    "texts without a tokenizer": (lambda: ["a", "b"], {}, "holds texts, .* tokenizer="),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_things_that_leave_something_open_are_refused_in_words(case: str) -> None:
    make, options, words = REFUSED[case]
    with pytest.raises(TangentError, match=words):
        as_data(make(), **options)
