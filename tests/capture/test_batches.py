"""Batches in every container that a model may take: right numbers everywhere, or words about the user's own batch."""

import dataclasses
import inspect
from collections import OrderedDict, UserDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.data import DataLoader, TensorDataset

import adaptive_tangents as at
import reference
from adaptive_tangents.capture.batches import take, tensors
from cases import Forward, normal


class Pair(NamedTuple):
    a: Tensor
    b: Tensor
    flag: bool = True


@dataclasses.dataclass(frozen=True)
class Record:
    a: Tensor
    rest: dict[str, Any]
    flag: bool = True


def both(m: nn.Module, a: Tensor, b: Tensor, flag: Any = True, *_: Any, **__: Any) -> Tensor:
    assert flag is True
    return m.fc(a) * m.scale + torch.tanh(m.fc(b))


def branched(m: nn.Module, a: Tensor, b: Tensor, flag: Any = True) -> Tensor:
    """Every sample takes its own branch, so vmap cannot run it."""
    return torch.stack([m.fc(r) * m.scale if float(r.sum()) > 0 else m.fc(q) for r, q in zip(a, b, strict=True)])


class TakesOne(nn.Module):
    """A model that takes a whole record."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.scale = nn.Linear(3, 2).double(), nn.Parameter(normal(2))

    def forward(self, inputs: Any) -> Tensor:
        return both(self, inputs.a, inputs.b if hasattr(inputs, "b") else inputs.rest["b"], inputs.flag)


def encoding(a: Tensor, b: Tensor) -> Any:
    return pytest.importorskip("transformers").BatchEncoding({"a": a, "b": b})


def made(function: Callable[..., Any] = both) -> nn.Module:
    torch.manual_seed(0)
    return TakesOne() if function is TakesOne else Forward(function, fc=nn.Linear(3, 2), scale=normal(2))


# What the model computes from (m, x…) and how the user packs the tensors a and b.
CASES: dict[str, tuple[Callable[..., Any], Callable[[Tensor, Tensor], Any]]] = {
    "tuple with a flag": (both, lambda a, b: (a, b, True)),
    "tuple with None": (both, lambda a, b: (a, b, True, None, "mean", 2.5, 3, torch.float64)),
    "list": (both, lambda a, b: [a, b]),
    "list of a DataLoader": (both, lambda a, b: next(iter(DataLoader(TensorDataset(a, b), batch_size=len(a))))),
    "dict with flags": (both, lambda a, b: {"a": a, "b": b, "flag": True, "labels": None, "mode": "x", "size": (4, 4)}),
    "OrderedDict": (both, lambda a, b: OrderedDict(b=b, a=a)),
    "UserDict": (both, lambda a, b: UserDict({"a": a, "b": b})),
    "BatchEncoding": (both, encoding),
    "named tuple by position": (both, Pair),
    "named tuple as one": (TakesOne, Pair),
    "dataclass": (TakesOne, lambda a, b: Record(a, {"b": b, "none": None})),
    "list of tensors as one": (lambda m, xs: both(m, *xs), lambda a, b: ([a, b],)),
    "nested": (lambda m, x, more: both(m, x, more[0]["b"], more[1]), lambda a, b: (a, ({"b": b}, True))),
    "nested in a dict": (lambda m, x: both(m, x["a"], x["in"].b), lambda a, b: {"x": {"a": a, "in": Pair(a, b)}}),
    "nested UserDict": (lambda m, x, k: both(m, x["a"], x.data["b"]), lambda a, b: (UserDict(a=a, b=b), 4)),
    "flag where vmap fails": (branched, lambda a, b: {"a": a, "b": b, "flag": True}),
}  # fmt: skip
every_container = pytest.mark.parametrize("name", CASES)


def case(name: str) -> tuple[nn.Module, Any, Any, reference.Array, reference.Array]:
    """The model, two batches, and the features of both by plain autograd of the tensors alone."""
    function, pack = CASES[name]
    model = made(function)
    plain = made(branched if function is branched else both)
    (a, b), (a2, b2) = (normal(9, 3), normal(9, 3)), (normal(4, 3), normal(4, 3))
    return (
        model, pack(a, b), pack(a2, b2), reference.jacobian(plain, (a, b)), reference.jacobian(plain, (a2, b2)),
    )  # fmt: skip


def close(found: Tensor, expected: reference.Array) -> None:
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=0, atol=1e-12 * np.abs(expected).max())


@every_container
def test_features_and_kernels_of_every_container_are_those_of_its_tensors(name: str) -> None:
    model, x, x2, phi, phi2 = case(name)
    close(at.tangent_features(model, x).dense(), phi)
    close(at.tangent_kernel(model, x, tile=4), reference.kernel(phi, phi))
    close(at.tangent_kernel(model, x, x2), reference.kernel(phi, phi2))


@every_container
def test_path_averages_and_the_linearized_module_take_every_container(name: str) -> None:
    model, x, _, phi, _ = case(name)
    start = {k: v.clone() for k, v in model.state_dict().items()}
    end = {k: v + 0.05 for k, v in start.items()}
    assert at.average_features(model, start, end, x, tol=1e-6).error <= 1e-6
    module = at.TangentModule(model, at.Fixed())
    for matrix in module.inner.values():
        matrix.data = torch.randn_like(matrix)
    moved = (module(x) - module.initial(x)).detach()
    beta = module.features(x).join(module.effective_coefficients())
    close(moved, phi @ beta.numpy())


@every_container
def test_stores_know_every_container_by_its_tensors_and_flags(name: str, tmp_path: Path) -> None:
    model, x, _, phi, _ = case(name)
    store = at.kernel_to_store(model, x, tmp_path / "k", tile=4, dtype=torch.float64)
    close(store.read(), reference.kernel(phi, phi))
    again = at.kernel_to_store(model, take(x, None), tmp_path / "k", tile=4, dtype=torch.float64, resume=True)
    assert again.complete
    other = take(x, None)
    tensors(other)[0].add_(1)
    with pytest.raises(at.TangentError, match="of other data x"):
        at.kernel_to_store(model, other, tmp_path / "k", tile=4, dtype=torch.float64, resume=True)


def test_another_flag_is_other_data(tmp_path: Path) -> None:
    model = made(lambda m, a, b, flag: m.fc(a) * m.scale)
    a, b = normal(5, 3), normal(5, 3)
    at.kernel_to_store(model, (a, b, True), tmp_path / "k")
    with pytest.raises(at.TangentError, match="of other data x"):
        at.kernel_to_store(model, (a, b, None), tmp_path / "k", resume=True)


def test_the_model_may_change_its_containers_and_the_users_stay_as_they_are() -> None:
    def popping(m: nn.Module, xs: list[Tensor], more: dict[str, Any]) -> Tensor:
        more["seen"] = True
        return m.fc(xs.pop()) * m.scale

    x = ([normal(5, 3), normal(5, 3)], {"b": normal(5, 3)})
    at.tangent_features(made(popping), x)
    assert len(x[0]) == 2
    assert list(x[1]) == ["b"]


# Refusals. Each names the place in the user's batch and what to do.

a, b = torch.ones(9, 3, dtype=torch.float64), torch.ones(9, 3, dtype=torch.float64)
CONTAINERS = r"x is a tensor, or a tuple, list, dict or dataclass of tensors, flags and None"
REFUSED: dict[str, tuple[Any, str]] = {
    "array": (a.numpy(), rf"{CONTAINERS}, got ndarray; convert it with torch\.from_numpy"),
    "array inside": ((a, {"b": b.numpy()}), rf"{CONTAINERS}, but x\[1\]\['b'\] is of type ndarray; convert it with"),
    "object inside": ((a, object()), rf"{CONTAINERS}, but x\[1\] is of type object; give the tensors that it holds"),
    "class inside": ((a, Record), rf"{CONTAINERS}, but x\[1\] is of type type"),
    "text": ("some text", rf"{CONTAINERS}, got str"),
    "None": (None, rf"{CONTAINERS}, got NoneType"),
    "DataLoader": (DataLoader(TensorDataset(a)), rf"{CONTAINERS}, got DataLoader; pass one batch of it"),
    "packed": (pack_padded_sequence(normal(4, 3, 3), torch.tensor([3, 2, 1, 1]), batch_first=True),
        r"x is of type PackedSequence; pass padded tensors, \(n, steps, features\)"),
    "numbers": ({"ids": [[1, 2], [3, 4]]}, r"x holds no tensors; .*return_tensors='pt'"),
    "names that are no words": ({1: a}, "the keys of x are the names of the model's arguments, got 1"),
    "sparse inside": ((a, b.to_sparse()), r"nested, sparse or quantized \(x\[1\]\); .*\.to_dense\(\)"),
    "csr": (a.to_sparse_csr(), r"nested, sparse or quantized \(x\); .*\.to_dense\(\)"),
    # Made in the test: torch imports its compiler for it.
    "jagged inside": (lambda: {"a": torch.nested.nested_tensor([a[:2], a], layout=torch.jagged)},
        r"nested.*\(x\['a'\]\); pad it"),
    "quantized": (torch.quantize_per_tensor(a.float(), 0.1, 0, torch.qint8), r"quantized.*\.dequantize\(\)"),
    "of other numbers": (Pair(a, torch.ones(20, 2)), r"different numbers of samples: \[9, 20\] \(x\.a \(9, 3\) float64, "
        r"x\.b \(20, 2\) float32\); give every tensor the samples first, and those that all samples share as buffers"),
    "a scalar inside": ((a, torch.tensor(2.0)), "the samples as its first dimension; got a scalar"),
    "texts": ({"a": a, "texts": ["word"] * 9}, r"x\['texts'\] has as many entries as there are samples.*make it a tensor"),
    "not finite, complex": ((a, torch.full((9,), complex(0, float("nan")))), "the input of sample 0 is not finite"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("call", ["tangent_features", "kernel_to_store"])
def test_a_batch_that_cannot_be_divided_into_samples_is_refused_by_its_place(
    name: str, call: str, tmp_path: Path
) -> None:
    x, message = REFUSED[name]
    x = x() if callable(x) else x
    function = getattr(at, call)
    function = inspect.unwrap(function)
    rest = (tmp_path / "k",) if call == "kernel_to_store" else ()
    with pytest.raises(at.TangentError, match=f"^{call}: .*{message}"):
        function(nn.Linear(3, 2).double(), x, *rest)


def test_the_second_batch_is_checked_as_the_first() -> None:
    with pytest.raises(at.TangentError, match=r"^tangent_kernel: x holds no tensors"):
        at.tangent_kernel(nn.Linear(3, 2).double(), a, [1, 2])


def test_the_linearized_module_refuses_what_it_cannot_take() -> None:
    module = at.TangentModule(nn.Linear(3, 2).double())
    with pytest.raises(at.TangentError, match=rf"^TangentModule: {CONTAINERS}, but x\[1\] is of type object"):
        module((a, object()))
    with pytest.raises(at.TangentError, match=r"^TangentModule: the model fails on x \(9, 4\) float64 \(mat1 and mat2"):
        module(torch.ones(9, 4, dtype=torch.float64))
    with pytest.raises(at.TangentError, match=r"^TangentModule: the model fails on x \(9, 4\) float64 \(mat1 and mat2"):
        module.initial(torch.ones(9, 4, dtype=torch.float64))
