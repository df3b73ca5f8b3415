"""What is no model, and models that fail on a batch or on a sample of it: one sentence with cause and remedy."""

import json
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import adaptive_tangents as at
import clean_process
import reference
from cases import Forward, normal

pytestmark = pytest.mark.filterwarnings(
    "ignore:`torch.jit", "ignore:There is a performance drop", "ignore:is_fx_tracing"
)

NO_MODELS = """
import json, tempfile
import torch
from torch import nn
import adaptive_tangents as at

class Trainer:
    model = nn.Linear(3, 2)

x, layer = torch.ones(4, 3), nn.Linear(3, 2)
given = {
    "function": lambda x: x, "builtin": torch.relu, "class": nn.Linear,
    "optimizer": torch.optim.SGD(layer.parameters(), lr=1.0),
    "state dict": layer.state_dict(), "tensor": x, "list": [layer], "holder": Trainer(), "number": 3, "None": None,
}
calls = {
    "tangent_features": lambda m: at.tangent_features(m, x),
    "tangent_kernel": lambda m: at.tangent_kernel(m, x, x),
    "average_features": lambda m: at.average_features(m, {}, {}, x),
    "TangentModule": lambda m: at.TangentModule(m),
    "kernel_to_store": lambda m: at.kernel_to_store(m, x, tempfile.mkdtemp() + "/k", dtype=torch.float64),
    "plan_kernel": lambda m: at.plan_kernel(m, x),
    "sketch_features": lambda m: at.sketch_features(m, x, at.Sketch(10)),
}
said = {}
for call, run in calls.items():
    for name, model in given.items():
        try:
            run(model)
            said[f"{call} {name}"] = "nothing"
        except Exception as error:
            said[f"{call} {name}"] = f"{type(error).__name__} {error}"
print(json.dumps(said))
"""
INSTEAD = {
    "function": "a function; pass a module that holds its parameters and calls it in forward",
    "builtin": "a function; pass a module that holds its parameters and calls it in forward",
    "class": "the class Linear; pass an instance of it",
    "optimizer": "the optimizer SGD; pass the model whose parameters it holds",
    "state dict": "a state dict or another mapping; pass the model, and a state dict as params=",
    "tensor": "a tensor; pass the model first and the batch x after it",
    "list": "list; pass a module",
    "holder": "Trainer; pass the module that it holds, such as its .model",
    "number": "int; pass a module",
    "None": "NoneType; pass a module",
}


@clean_process.in_one_group
def test_what_is_no_module_is_refused_by_every_call_with_what_to_pass() -> None:
    # Here, annotations are checked before the functions can.
    done = clean_process.run(NO_MODELS)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert len(said) == 7 * len(INSTEAD)
    for place, words in said.items():
        call, _, name = place.partition(" ")
        assert words == f"TangentError {call}: the model is a torch.nn.Module, got {INSTEAD[name]}"


def linear() -> nn.Module:
    return nn.Linear(3, 2).double()


def of(function: Callable[..., Any], **parts: Any) -> nn.Module:
    return Forward(function, l=linear(), **parts)


graph = torch.tensor([[0, 1, 2, 8], [1, 2, 0, 3]])
ONE_SAMPLE = (
    r"the model runs on all {n} samples of x but not on one sample of it \({words}\); features are of one sample"
)
FAILS: dict[str, tuple[Callable[[], nn.Module], Any, str]] = {
    "another width": (linear, normal(9, 4), r"the model fails on x \(9, 4\) float64 \(mat1 and mat2 shapes cannot be "
        r"multiplied \(9x4 and 3x2\)\); pass x in the shape and dtype that the model takes"),
    "another width in a dict": (lambda: of(lambda m, ids, mask: m.l(ids)), {"ids": normal(20, 4), "mask": normal(20, 2)},
        r"the model fails on x\['ids'\] \(20, 4\) float64, x\['mask'\] \(20, 2\) float64 \(.*20x4 and 3x2"),
    "another name": (lambda: of(lambda m, ids: m.l(ids)), {"x": normal(9, 3)},
        r"the model fails on x\['x'\] \(9, 3\) float64 \(TypeError: .*'x'\); x holds the arguments of one call"),
    "a dict for one argument": (lambda: of(lambda m, batch: m.l(batch["a"])), {"a": normal(9, 3)},
        r"TypeError: .*; x holds the arguments of one call.*\(x,\) for one argument that is a container"),
    "with targets": (linear, [normal(9, 3), normal(9)], r"the model fails on x\[0\] \(9, 3\) float64, x\[1\] \(9,\) float64 "
        r"\(TypeError: .*\); x holds the arguments of one call of the model, without targets"),
    "an index out of range": (lambda: Forward(lambda m, i: m.e(i).sum(1), e=nn.Embedding(5, 2)),
        torch.tensor([[1, 2]] * 13 + [[77, 0]] + [[2, 3]] * 6),
        r"the model fails on x \(20, 2\) int64(, in 3 samples of it)? \(IndexError: index out"),
    "no forward": (lambda: nn.ModuleList([linear()]), normal(9, 3),
        r"missing the required \"forward\" function\); pass a module with a forward of its own, not ModuleList"),
    "what it says of a wrong value": (
        lambda: of(lambda m, x: m.l(x).unflatten(1, (3, -1))), normal(9, 3), r"fails on x \(9, 3\) float64 \(.*unflatten",
    ),
    "rows of another number": (lambda: of(lambda m, x: m.l(x)[:, 0]), normal(20, 3),
        r"the output has shape \(20,\), expected \(20, c\), one row a sample; pass output_fn="),
    "squeezed": (lambda: of(lambda m, x: m.l(x).squeeze()), normal(9, 3),
        ONE_SAMPLE.format(n=9, words=r"the output has shape \(2,\), expected \(1, c\), one row a sample") + ".*squeeze"),
    "constant size": (lambda: of(lambda m, x: m.l(x).view(9, 2)), normal(9, 3),
        ONE_SAMPLE.format(n=9, words=r"shape '\[9, 2\]' is invalid for input of size 2") + ".*a constant batch size"),
    "pairs": (lambda: of(lambda m, x: m.l(x.view(-1, 2, 3)).flatten(0, 1)), normal(8, 3), ONE_SAMPLE.format(n=8, words=".*")),
    "nodes of one graph": (lambda: of(lambda m, x: torch.zeros(len(x), 2).double().index_add(0, graph[0], m.l(x)[graph[1]])),
        normal(9, 3), ONE_SAMPLE.format(n=9, words="IndexError: .*out of bounds.*") + ".*one graph over all samples"),
    "adjacency": (lambda: of(lambda m, x: torch.ones(9, 9).double() @ m.l(x)), normal(9, 3),
        ONE_SAMPLE.format(n=9, words=".*9x9 and 1x2.*")),
    "exported for one size": (lambda: torch.export.export(linear(), (normal(9, 3),)).module(), normal(9, 3),
        ONE_SAMPLE.format(n=9, words=".*[Gg]uard.*") + ".*an export without dynamic_shapes"),
    "no derivative": (lambda: of(lambda m, x: torch.special.zeta(m.l(x).abs() + 2, torch.ones(()).double())), normal(9, 3),
        r"the model runs on x, but its derivatives cannot be computed \(.*zeta.*\); replace"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAILS)
def test_a_failure_is_told_of_the_users_own_batch(name: str) -> None:
    make, x, message = FAILS[name]
    model = make()
    with pytest.raises(at.TangentError, match=f"^tangent_features: .*{message}"):
        at.tangent_features(model, x)
    with pytest.raises(at.TangentError, match=f"^tangent_kernel: .*{message}") as caught:
        at.tangent_kernel(model, x, outputs="trace", tile=3)
    assert "\n" not in str(caught.value)


def test_a_failure_on_the_second_batch_names_its_shape() -> None:
    with pytest.raises(at.TangentError, match=r"the model fails on x \(4, 5\) float64"):
        at.tangent_kernel(linear(), normal(9, 3), normal(4, 5))


def test_a_models_own_errors_pass_unchanged() -> None:
    class Closed(Exception):
        pass

    def closed(m: nn.Module, x: Tensor) -> Tensor:
        raise Closed("on purpose")

    with pytest.raises(Closed, match=r"^on purpose$"):
        at.tangent_features(of(closed), normal(9, 3))


def test_a_failing_output_fn_is_named() -> None:
    with pytest.raises(
        at.TangentError, match=r"output_fn fails on the Tensor that the model returned \(AttributeError: .*logits"
    ):
        at.tangent_features(linear(), normal(9, 3), output_fn=lambda out: out.logits)


# Models with parts that are no plain modules.


def traced() -> nn.Module:
    return nn.Sequential(torch.jit.trace(nn.Linear(3, 4).double(), normal(9, 3)), nn.Tanh(), nn.Linear(4, 2).double())


def scripted() -> nn.Module:
    return nn.Sequential(torch.jit.script(nn.Linear(3, 4).double()), nn.Tanh(), nn.Linear(4, 2).double())


def exported() -> nn.Module:
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    return torch.export.export(net, (normal(9, 3),), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)).module()


def symbolic() -> nn.Module:
    return torch.fx.symbolic_trace(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double())


def int8_weights() -> nn.Module:
    model = of(
        lambda m, x: m.l(torch.tanh(x @ (m.w.double() * m.scale[:, None]).T).repeat(1, 2)[:, :3]), scale=normal(2)
    )
    model.w = nn.Parameter(torch.randint(-9, 9, (2, 3), dtype=torch.int8), requires_grad=False)
    return model


def quantized_table() -> nn.Module:
    model = of(lambda m, x: m.l(torch.tanh(x @ m.q.dequantize().double())))
    model.register_buffer("q", torch.quantize_per_tensor(torch.randn(3, 3), 0.1, 0, torch.qint8))
    return model


def frozen_sparse() -> nn.Module:
    model = of(lambda m, x: m.l(torch.tanh(torch.sparse.mm(m.w, x.T).T)))
    model.w = nn.Parameter(normal(3, 3).relu().to_sparse(), requires_grad=False)
    return model


def sparse_gradients() -> nn.Module:
    return Forward(
        lambda m, x: m.e(x.sign().long() + 1).flatten(1) @ m.w, e=nn.Embedding(3, 2, sparse=True), w=normal(6, 2)
    )


PARTS = [traced, scripted, exported, symbolic, int8_weights, quantized_table, frozen_sparse, sparse_gradients]


@pytest.mark.parametrize("make", PARTS)
def test_parts_that_are_no_plain_modules_leave_features_right(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model, x = make(), normal(9, 3)
    phi = jacobian(model, x)
    close(at.tangent_features(model, x).dense(), phi)
    close(at.tangent_kernel(model, x, outputs="trace", tile=4), reference.kernel(phi, phi, "trace"))
    if make in (traced, scripted, frozen_sparse):
        with pytest.raises(at.TangentError, match=r"^TangentModule: '.*' is (a TorchScript module|sparse).*; "):
            at.TangentModule(model, at.Fixed())
        return
    module = at.TangentModule(model, at.Fixed())
    for matrix in module.inner.values():
        matrix.data = torch.randn_like(matrix)
    beta = module.features(x).join(module.effective_coefficients())
    close(module(x) - module.initial(x), phi @ beta.numpy())
    module(x).square().sum().backward()


def jacobian(model: nn.Module, x: Tensor) -> reference.Array:
    """∂f/∂θ by autograd, sample by sample, in the model itself, which has no copy."""
    chosen = [p for p in model.parameters() if p.requires_grad]
    rows = []
    for k in range(len(x)):
        for value in model(x[k : k + 1])[0]:
            found = torch.autograd.grad(value, chosen, retain_graph=True, allow_unused=True)
            dense = [
                torch.zeros_like(p) if g is None else g.to_dense() if g.is_sparse else g
                for p, g in zip(chosen, found, strict=True)
            ]
            rows.append(torch.cat([g.flatten() for g in dense]).numpy())
    return np.stack(rows).reshape(len(x), -1, rows[0].size)


def close(found: Tensor, expected: reference.Array) -> None:
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=0, atol=1e-12 * np.abs(expected).max())


@pytest.mark.parametrize("layout", ["coo", "csr"])
def test_selected_sparse_parameters_are_refused(layout: str) -> None:
    model = of(lambda m, x: m.l(torch.tanh((m.w @ x.T).T)))
    w = normal(3, 3)
    model.w = nn.Parameter(w.to_sparse() if layout == "coo" else w.to_sparse_csr())
    for call, run in {
        "tangent_features": at.tangent_features,
        "TangentModule": lambda m, x: at.TangentModule(m)(x),
    }.items():
        with pytest.raises(at.TangentError, match=rf"^{call}: .*'w' is sparse or nested.*to_dense"):
            run(model, normal(9, 3))
    at.tangent_features(model, normal(9, 3), wrt="l.*")


@pytest.fixture
def group(tmp_path: Any) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("group")
def test_sharded_models_are_refused_and_left_as_they_are() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
    from torch.distributed.tensor import distribute_module

    mesh, x = init_device_mesh("cpu", (1,)), normal(9, 3)
    sharded = nn.Sequential(linear(), nn.Tanh(), nn.Linear(2, 2).double())
    fully_shard(sharded[0], mesh=mesh)
    wrapped = FullyShardedDataParallel(linear(), device_id=torch.device("cpu"))
    for model, message in (
        (sharded, "'0' is sharded by FSDP"), (wrapped, "the model is sharded by FSDP"),
        (distribute_module(linear(), mesh), "'weight' is a DTensor"),
    ):  # fmt: skip
        for call in (at.tangent_features, at.TangentModule.__init__):
            arguments = (
                (model, x) if call is at.tangent_features else (at.TangentModule.__new__(at.TangentModule), model)
            )
            with pytest.raises(
                at.TangentError, match=rf"{message}.*; load the full state dict into a model that is not sharded"
            ):
                call(*arguments)
    assert sharded(x).shape == (9, 2)
