"""The contenders for a full tangent kernel, ours and the peers': each takes a network with its batch and returns a row.

A row holds the seconds, the peak memory and a sample of the kernel's entries, by which contenders are compared.
Peers are imported where they are used: each contender runs in a process of its own.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import adaptive_tangents as at
from adaptive_tangents.features import contraction, kernel_layout, plans
from common import OUT, best_of, peak_memory
from counting import counted_operations, peak_rate
from networks import Network

Row = dict[str, Any]

ENTRIES = 512  # of a kernel, drawn once: enough to tell a wrong kernel from a right one
COLUMNS = (
    "seconds", "× ours", "peak GB", "difference", "GFLOP", "as products s", "× products",
    "compile s", "note",
)  # fmt: skip
OTHER_PYTHON = Path(".venv-neural-tangents") / "bin" / "python"


def places(entries: int) -> Tensor:
    """Where a kernel of so many entries is sampled."""
    return torch.randint(entries, (ENTRIES,), generator=torch.Generator().manual_seed(0))


def sampled(kernel: Tensor) -> Row:
    """Some entries of a kernel (n, c, n, c) and its norm."""
    flat = kernel.detach().flatten()
    return {"norm": float(flat.double().norm()), "entries": flat[places(len(flat))].tolist()}


def timed(make: Callable[[], Tensor], *, repeats: int, warm: int) -> Row:
    """The row of a contender whose kernel ``make`` makes, as (n, c, n, c)."""
    found: list[Tensor] = []

    def run() -> None:
        found[:] = [make()]

    seconds = best_of(run, repeats=repeats, warm=warm)
    return {"seconds": seconds, "peak GB": peak_memory(), **sampled(found[0])}


def ours(network: Network, *, repeats: int = 5, details: bool = True) -> Row:
    """`tangent_kernel`, checks included; with what is counted, and what so many operations take as one product."""
    model, x = network
    row = timed(lambda: at.tangent_kernel(model, x), repeats=repeats, warm=1)
    if details:
        feats = at.tangent_features(model, x)
        operations = counted_operations(model, x) + feats.plan().operations
        rate = peak_rate()
        row["GFLOP"] = operations / 1e9
        row["as products s"] = operations / rate
        row["× products"] = row["seconds"] * rate / operations
        row["blocks"] = by_block(feats, rate)
    return row


def by_block(feats: at.TangentFeatures, rate: float) -> list[Row]:
    """For every block its route and how near its contraction alone comes to the rate of a product of matrices."""
    rows = []
    for step in feats.plan().blocks:
        alone = {step.name: feats.blocks[step.name]}
        plan = plans.KernelPlan((step,), 0, 0, 0)
        kernels = {
            step.name: kernel_layout.empty_kernel(feats.n, feats.n, feats.c, "full", torch.empty(0, dtype=feats.dtype))
        }

        def run(alone: Any = alone, plan: Any = plan, kernels: Any = kernels) -> None:
            contraction.contract_blocks(alone, alone, plan, kernels, "full", symmetric=True)

        seconds = best_of(run, repeats=3)
        rows.append({
            "block": step.name, "o × i": f"{step.shape[0]} × {step.shape[1]}", "t": step.positions, "route": step.route,
            "GFLOP": step.operations / 1e9, "ms": seconds * 1e3, "% of peak": 100 * step.operations / seconds / rate,
        })  # fmt: skip
    return rows


def torch_func(network: Network, *, repeats: int = 1, warm: int = 0) -> Row:
    """PyTorch's tutorial on neural tangent kernels, ``vmap(jacrev)``."""
    return timed(by_torch_func(*network), repeats=repeats, warm=warm)


def by_torch_func(
    model: nn.Module, x: Tensor, output_fn: Callable[[Any], Tensor] | None = None
) -> Callable[[], Tensor]:
    """The tutorial's kernel: features of every sample by ``vmap(jacrev)``, then one product a parameter."""
    params = {name: p.detach() for name, p in model.named_parameters()}

    def single(params: dict[str, Tensor], sample: Tensor) -> Tensor:
        out = torch.func.functional_call(model, params, (sample[None],))
        return (out if output_fn is None else output_fn(out))[0]

    def kernel() -> Tensor:
        jacobian = torch.func.vmap(torch.func.jacrev(single), (None, 0))(params, x)
        flat = [j.flatten(2) for j in jacobian.values()]
        return torch.stack([torch.einsum("Naf,Mbf->NMab", j, j) for j in flat]).sum(0).transpose(1, 2)

    return kernel


def nngeometry(network: Network, *, repeats: int = 3) -> Row:
    """Nngeometry's dense Gram matrix."""
    from nngeometry.gram import GramMatrix
    from nngeometry.layercollection import LayerCollection
    from nngeometry.object import FMatDense
    from torch.utils.data import DataLoader, TensorDataset

    model, x = network
    n = len(x)
    loader = DataLoader(TensorDataset(x, torch.zeros(n)), batch_size=n)
    collection = LayerCollection.from_model(model)

    def kernel() -> Tensor:
        gram = GramMatrix(model=model, loader=loader, representation=FMatDense, layer_collection=collection)
        return gram.to_torch().detach().permute(1, 0, 3, 2)

    return timed(kernel, repeats=repeats, warm=1)


def asdl(network: Network, *, repeats: int = 1) -> Row:
    """ASDL (asdfghjkl): the whole Jacobian from its batch gradients, one backward pass an output, then one product.

    This is its ``empirical_direct_ntk``, which asks modules for an attribute that 0.1a5 no longer gives them and so finds
    no gradients; here they are asked of the context that 0.1a5 keeps them in.
    """
    from asdl import OP_BATCH_GRADS, extend, skip_param_grad

    model, x = network
    x = x.clone().requires_grad_(True)  # so that the graph is there while parameters' own gradients are skipped

    def kernel() -> Tensor:
        with extend(model, OP_BATCH_GRADS) as context, skip_param_grad(model):
            out = model(x)
            n, c = out.shape
            jacobian = out.new_zeros(n, c, sum(p.numel() for p in model.parameters()))
            for k in range(c):
                context.clear_batch_grads()
                torch.autograd.grad(out[:, k].sum(), x, retain_graph=True)
                jacobian[:, k] = context.full_batch_grads(model)
        return torch.einsum("ncp,mdp->ncmd", jacobian, jacobian)

    return timed(kernel, repeats=repeats, warm=0)


def curvlinops(network: Network, *, columns: int = 50) -> Row:
    """Curvlinops' Jacobian operators, J (Jᵀ E) for some columns of the identity at a time: it has no kernel of its own."""
    from curvlinops import JacobianLinearOperator, TransposedJacobianLinearOperator

    model, x = network
    n, params = len(x), list(model.parameters())
    c = model(x).shape[1]
    data = [(x, torch.zeros(n))]
    jacobian = JacobianLinearOperator(model, params, data, check_deterministic=False)
    transposed = TransposedJacobianLinearOperator(model, params, data, check_deterministic=False)

    def kernel() -> Tensor:
        parts = [jacobian @ (transposed @ e) for e in torch.eye(n * c).split(columns, 1)]
        return torch.cat(parts, 1).reshape(n, c, n, c)

    return timed(kernel, repeats=1, warm=0)


NEURAL_TANGENTS = ("structured", "products", "jacobians")  # its three implementations


def neural_tangents(name: str, make: Callable[[], Network], implementation: str) -> Row:
    """One implementation of neural-tangents at the same parameters and inputs.

    It runs in the environment that ``make bench-neural-tangents`` makes, in place of this process, so that whoever loses
    patience with this contender ends it, and with nothing else.
    """
    if not OTHER_PYTHON.exists():
        return {"skipped": "make bench-neural-tangents sets its environment up"}
    model, x = make()
    OUT.mkdir(parents=True, exist_ok=True)
    values = {f"parameter {k}": p.detach().numpy() for k, p in enumerate(model.parameters())}
    chosen = places((len(x) * model(x).shape[1]) ** 2).numpy()
    path = OUT / f"{name}.npz"
    np.savez(path, x=x.numpy(), places=chosen, **values)
    script = Path(__file__).parent / "neural_tangents" / "bench_neural_tangents.py"
    os.execv(OTHER_PYTHON, [str(OTHER_PYTHON), str(script), name, implementation, str(path)])


def by_implementation(name: str, make: Callable[[], Network]) -> dict[str, Callable[[], Row]]:
    """A contender for each of its implementations, each with a patience of its own."""
    return {
        f"{name}: neural-tangents, {kind}": lambda kind=kind: neural_tangents(name, make, kind)
        for kind in NEURAL_TANGENTS
    }
