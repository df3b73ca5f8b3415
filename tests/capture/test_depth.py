"""Deep graphs and deeply nested models: they take the time of their passes, and no recursion ends the process."""

import functools
import gc
import subprocess
import sys
import textwrap
from contextlib import suppress

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import adaptive_tangents as at
import clean_process
import reference
from adaptive_tangents.capture import held_nodes as held_file
from cases import Forward, normal

pytestmark = pytest.mark.xdist_group("depth")

DEEP = textwrap.dedent("""
    import gc
    import sys
    import torch
    from torch import Tensor, nn
    import adaptive_tangents as at
    from adaptive_tangents.capture import held_nodes

    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    kept = []


    class Deep(nn.Module):
        def __init__(self, steps, step, fails=False, keeps=False, finite=True):
            super().__init__()
            self.first, self.w, self.last = nn.Linear(2, 3), nn.Parameter(torch.randn(3, 3) / 2), nn.Linear(3, 1)
            self.steps, self.step, self.fails, self.keeps, self.finite = steps, step, fails, keeps, finite

        def forward(self, x):
            h = u = self.first(x)
            for k in range(self.steps):
                h = self.step(h, u, self.w)
                if self.keeps and k % 1000 == 0:
                    kept.append(h)
                if self.fails and k == self.steps - 2:
                    raise KeyError("in forward")
            if self.keeps:
                kept.append(self.last(h * 2))  # a call that the output does not use
            return self.last(h if self.finite else h / 0)


    class Recurrent(nn.Module):
        def __init__(self, kind):
            super().__init__()
            self.cells, self.last = kind(2, 3, batch_first=True), nn.Linear(3, 1)

        def forward(self, x):
            return self.last(self.cells(x)[0][:, -1])


    def right(model, x):
        feats = at.tangent_features(model, x)
        out = model(x[:1])
        found = torch.autograd.grad(out, list(model.parameters()), allow_unused=True, materialize_grads=True)
        truth = torch.cat([part.flatten() for part in found])
        assert (feats.dense()[0, 0] - truth).norm() <= 1e-9 * truth.norm()
        assert not held_nodes._graphs


    x = torch.randn(3, 2)
    tanh = lambda h, u, w: torch.tanh(h)
""")


USES = textwrap.dedent("""
    right(Recurrent(nn.GRU), torch.randn(3, 1000, 2))
    right(Deep(5000, tanh), x)
    right(Deep(5000, lambda h, u, w: h + u), x)
    right(Deep(1700, lambda h, u, w: torch.tanh(h @ w + u)), x)

    at.tangent_features(Deep(5000, tanh, keeps=True), x)
    assert held_nodes._graphs
    kept.clear()
    gc.collect()
    assert not held_nodes._graphs and held_nodes._at_collection not in gc.callbacks
    try:
        at.tangent_features(Deep(5000, tanh, finite=False), x)
    except at.TangentError as error:
        held = error
    assert held_nodes._graphs
    del held
    gc.collect()
    assert not held_nodes._graphs

    try:
        at.tangent_features(Deep(5000, tanh, fails=True), x)
    except KeyError as error:
        held = error
    assert "in forward" in str(held)
    print("right and freed", flush=True)

    at.tangent_features(Deep(5000, tanh, keeps=True), x)
    print("in use at the end", flush=True)
    at.tangent_features(Deep(5000, tanh, finite=False), x)
""")


@functools.cache
def _ended() -> subprocess.CompletedProcess[str]:
    """Run all in a process of its own, so that a crash is a failed test; 4000 nodes overflow its small stack."""
    return clean_process.run(DEEP + USES, stack=1 << 20)


@clean_process.in_one_group
def test_features_of_deep_networks_are_right_and_graphs_are_freed_with_their_last_holder() -> None:
    """An error within the forward pass reaches the user, too."""
    made = _ended()
    assert "right and freed" in made.stdout, made.stderr[-2000:]


@clean_process.in_one_group
def test_a_deep_graph_that_is_in_use_at_the_end_of_the_process_does_no_harm() -> None:
    made = _ended()
    assert "in use at the end" in made.stdout, made.stderr[-2000:]
    assert made.returncode == 1, made.stderr[-2000:]
    assert "TangentError" in made.stderr


def test_an_interrupt_while_a_graph_is_freed_loses_no_node() -> None:
    for instant in (0, 700, 5000, 8000):
        x = torch.randn(2, requires_grad=True)
        out = x
        for _ in range(3000):
            out = (out + x).tanh()
        with held_file.held_nodes() as nodes:
            seen = [out.grad_fn]
            nodes.parents[out.grad_fn] = []
            for node in seen:
                for k, (successor, number) in enumerate(node.next_functions):
                    if successor is not None and successor not in nodes.parents:
                        seen.append(successor)
                    if successor is not None:
                        nodes.parents.setdefault(successor, []).append((node, k, number))
        del out, seen, node, successor

        left = [instant]

        class Interrupted(dict):  # type: ignore[type-arg]
            def __contains__(self, key: object, left: list[int] = left) -> bool:
                left[0] -= 1
                if left[0] == -1:
                    raise KeyboardInterrupt
                return super().__contains__(key)

        graph = next(iter(held_file._graphs))
        graph._counts = Interrupted(graph._counts)
        with pytest.raises(KeyboardInterrupt):
            held_file.free_graphs()
        held_file.free_graphs()
        gc.collect()
        assert not held_file._graphs


def _nested(depth: int) -> list[nn.Module]:
    """Models nested 0, 1, 2, … times."""
    models: list[nn.Module] = [nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)).double()]
    for _ in range(depth):
        models.append(nn.Sequential(models[-1]))
    return models


def _runs(model: nn.Module, x: Tensor) -> bool:
    with suppress(RecursionError):
        return model(x) is not None
    return False


def test_models_may_be_nested_as_deeply_as_torch_can_run_them() -> None:
    x, limit = normal(4, 2), sys.getrecursionlimit()
    model = next(model for model in reversed(_nested(limit // 3)) if _runs(model, x))
    assert at.tangent_kernel(model, x).shape == (4, 1, 4, 1)
    end = {name: value + 0.01 for name, value in model.state_dict().items()}
    assert at.average_features(model, model.state_dict(), end, x).error < 1e-3
    assert at.TangentModule(model)(x).shape == (4, 1)
    assert sys.getrecursionlimit() == limit


@pytest.mark.parametrize("make", [at.tangent_features, at.tangent_kernel, lambda model, x: at.TangentModule(model)])
def test_deeper_nesting_than_the_recursion_limit_is_refused_in_words(make: object) -> None:
    limit, model = sys.getrecursionlimit(), _nested(2500)[-1]
    with pytest.raises(at.TangentError, match=r"deeper than Python's recursion limit.*sys\.setrecursionlimit"):
        make(model, normal(4, 2))  # type: ignore[operator]
    assert sys.getrecursionlimit() == limit


def test_uses_of_one_weight_through_different_views_are_told_apart() -> None:
    def function(self: Forward, x: Tensor) -> Tensor:
        for k in (0, 1, 2, 1, 0, 2):
            x = torch.tanh(x @ self.w[k : k + 3].T + self.w.T[0, k : k + 3])
        return x

    model, x = Forward(function, w=nn.Parameter(normal(5, 3))), normal(6, 3)
    np.testing.assert_allclose(at.tangent_features(model, x).dense().numpy(), reference.jacobian(model, x), atol=1e-12)


@pytest.mark.parametrize(
    "layer",
    [
        lambda: nn.Linear(3, 3),
        lambda: nn.LayerNorm(3),
        lambda: nn.Sequential(nn.Unflatten(1, (3, 1)), nn.Conv1d(3, 3, 1), nn.Flatten()),
        lambda: nn.Sequential(nn.Unflatten(1, (3, 1)), nn.Conv1d(3, 3, 1, groups=3), nn.Flatten()),
        lambda: nn.Sequential(nn.Unflatten(1, (3, 1)), nn.ConvTranspose1d(3, 3, 1), nn.Flatten()),
        lambda: nn.GRUCell(3, 3),
        lambda: nn.GroupNorm(1, 3),
    ],
    ids=["linear", "layer norm", "convolution", "grouped", "transposed", "cell", "group norm"],
)
def test_many_calls_of_one_layer_are_made_together(layer: object) -> None:
    def function(self: Forward, x: Tensor) -> Tensor:
        for _ in range(5):
            x = torch.tanh(self.layer(x)) + x
        return x

    model, x = Forward(function, layer=layer()).double(), normal(6, 3)  # type: ignore[operator]
    np.testing.assert_allclose(at.tangent_features(model, x).dense().numpy(), reference.jacobian(model, x), atol=1e-12)
