"""Kernel of averaged features on the MNIST network: time and peak memory against what the features would take."""

import resource
import time

import torch

import adaptive_tangents as at
from adaptive_tangents.experiments.training import relu_network
from common import contend


def measure(n: int, c: int, nodes: int) -> dict[str, object]:
    generator = torch.Generator().manual_seed(0)
    names = ("hidden1", "hidden2", "readout")
    model, other = (relu_network((784, 256, 256, c), names, bias=True, generator=generator) for _ in range(2))
    x = torch.randn(n, 784, generator=generator)
    start, end = model.state_dict(), other.state_dict()
    at.average_features(model, start, end, x[:8], nodes=2).kernel()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    average = at.average_features(model, start, end, x, nodes=nodes)
    captured = time.perf_counter()
    kernel = average.kernel()
    seconds = time.perf_counter() - captured
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e6
    plan = average.plan()
    return {
        "features s": captured - started,
        "kernel s": seconds,
        "GFLOP/s": plan.operations / seconds / 1e9,
        "grown GB": grown,
        "factors GB": average.bytes / 1e9,
        "n·c·p GB": n * c * average.p * 4 / 1e9,
        "kernel GB": kernel.numel() * 4 / 1e9,
    }


contenders = {
    "n=500, c=1, 50 nodes": lambda: measure(500, 1, 50),
    "n=500, c=10, 16 nodes": lambda: measure(500, 10, 16),
    "n=2000, c=1, 16 nodes": lambda: measure(2000, 1, 16),
}

if __name__ == "__main__":
    contend(
        __file__, contenders, "average_features(...).kernel(), MLP 784-256-256-c, float32",
        ("features s", "kernel s", "GFLOP/s", "grown GB", "factors GB", "n·c·p GB", "kernel GB"),
    )  # fmt: skip
