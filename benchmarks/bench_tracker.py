"""What a Tracker takes of the time of training, by its budget, with kernels of all outputs or of random directions."""

import time

import torch
from torch import nn

import adaptive_tangents as at
from bench_module import transformer, wide
from common import contend

_SECONDS = 15.0  # of training
_CALLS = 50  # between two records, where there is no budget


def hundred() -> tuple[nn.Module, torch.Tensor]:
    """The transformer of `bench_module.py`, with 100 outputs."""
    model, x = transformer()
    model.head = nn.Linear(64, 100)
    return model, x


NETWORKS = {"MLP 784-1024×2-10": (wide, 10), "transformer, 100 outputs": (hundred, 100)}
BUDGETS = {"1 %": 0.01, "5 %": 0.05, "20 %": 0.2, f"none, every {_CALLS} steps": None}
OUTPUTS = {"exact": "trace", "8 directions": 8}


def measure(network: str, budget: str, outputs: str) -> dict[str, object]:
    """A training by Adam, and what its calls of `record` and `close` take, by processor time."""
    torch.manual_seed(0)
    make, c = NETWORKS[network]
    model, batch = make()
    x, y = torch.randn(1000, *batch.shape[1:]), torch.randint(0, c, (1000,))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    free = {} if BUDGETS[budget] is not None else {"every": _CALLS, "samples": 64}
    tracker = at.Tracker(model, x, y, budget=BUDGETS[budget], outputs=OUTPUTS[outputs], clock=time.process_time, **free)
    took, steps, began = 0.0, 0, time.process_time()
    while time.process_time() - began - took < _SECONDS:
        started = time.process_time()
        tracker.record(steps)
        took += time.process_time() - started
        part = torch.randint(len(x), (len(batch),))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[part]), y[part]).backward()
        optimizer.step()
        steps += 1
    training = time.process_time() - began - took
    started = time.process_time()
    tracker.close(steps)
    took += time.process_time() - started
    records = len(tracker.records)
    samples = int(tracker.summary().partition("K of ")[2].split()[0])
    return {
        "step ms": 1e3 * training / steps, "steps": steps, "samples": samples, "records": records,
        "record ms": 1e3 * tracker.records[-1].seconds, "share": f"{100 * took / training:.2g} %",
        "share told": f"{100 * tracker.cost.share:.2g} %",
    }  # fmt: skip


contenders = {
    f"{network}: {budget}, {outputs}": lambda network=network, budget=budget, outputs=outputs: measure(  # type: ignore[misc]
        network, budget, outputs
    )
    for network in NETWORKS
    for outputs in OUTPUTS
    for budget in BUDGETS
    if budget == "5 %" or (outputs == "exact" and (BUDGETS[budget] or network.startswith("MLP")))  # else minutes
}

if __name__ == "__main__":
    contend(
        __file__,
        contenders,
        f"a Tracker in {_SECONDS:g} s of training (Adam, cross-entropy), by budget; processor time",
        ("step ms", "steps", "samples", "records", "record ms", "share", "share told", "peak GB"),
    )
