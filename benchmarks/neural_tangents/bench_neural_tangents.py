"""neural-tangents on the networks of the other benchmarks, jitted: called by them with parameters and inputs in a file.

    python bench_neural_tangents.py {MLP,CNN} {structured,products,jacobians} FILE.npz

Prints one row as JSON; compilation is timed apart.
"""

import json
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import neural_tangents as nt

Parameters = list[Any]

IMPLEMENTATIONS = {
    "structured": nt.NtkImplementation.STRUCTURED_DERIVATIVES,
    "products": nt.NtkImplementation.NTK_VECTOR_PRODUCTS,
    "jacobians": nt.NtkImplementation.JACOBIAN_CONTRACTION,
}


def mlp(parameters: Parameters, x: Any) -> Any:
    """Linear layers with ReLU between, weights (inputs, outputs).

    So the library's own layers have them; of a weight transposed inside the function it finds no structure, and takes as
    long as with Jacobians.
    """
    pairs = list(zip(parameters[::2], parameters[1::2], strict=True))
    for k, (w, b) in enumerate(pairs):
        x = x @ w + b
        if k < len(pairs) - 1:
            x = jax.nn.relu(x)
    return x


def cnn(parameters: Parameters, x: Any) -> Any:
    """Four convolutions 3×3 with ReLU and pooling, then `mlp`. Channels come last, where jax is quickest."""
    x = jnp.transpose(x, (0, 2, 3, 1))
    for w, b in zip(parameters[:8:2], parameters[1:8:2], strict=True):
        x = jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "OIHW", "NHWC")) + b
        x = jax.lax.reduce_window(jax.nn.relu(x), -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    return mlp(parameters[8:], jnp.transpose(x, (0, 3, 1, 2)).reshape(x.shape[0], -1))


def measure(network: Callable[[Parameters, Any], Any], parameters: Parameters, x: Any, implementation: Any) -> Any:
    """Seconds of compiling with a first call, the least of five calls after it (one if slow), and the kernel (n, c, n, c)."""
    function = nt.empirical_ntk_fn(network, trace_axes=(), vmap_axes=0, implementation=implementation)
    kernel = jax.jit(lambda parameters, x: function(x, None, parameters))
    started = time.perf_counter()
    made = kernel(parameters, x).block_until_ready()
    compiled = time.perf_counter() - started
    seconds = []
    while len(seconds) < 5 and sum(seconds) < 20:
        started = time.perf_counter()
        made = kernel(parameters, x).block_until_ready()
        seconds.append(time.perf_counter() - started)
    return compiled, min(seconds), np.asarray(made).transpose(0, 2, 1, 3)


def main(name: str, implementation: str, path: str) -> None:
    stored = np.load(path)
    parameters = [stored[f"parameter {k}"] for k in range(len(stored.files) - 2)]
    parameters = [jnp.asarray(np.ascontiguousarray(p.T) if p.ndim == 2 else p) for p in parameters]
    compiled, seconds, kernel = measure(
        {"MLP": mlp, "CNN": cnn}[name], parameters, jnp.asarray(stored["x"]), IMPLEMENTATIONS[implementation]
    )
    row = {
        "seconds": seconds,
        "compile s": compiled,
        "peak GB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
        "norm": float(np.linalg.norm(kernel.astype(np.float64))),
        "entries": kernel.ravel()[stored["places"]].tolist(),
        "versions": {"neural-tangents": nt.__version__, "jax": jax.__version__},
    }
    print(json.dumps(row))


if __name__ == "__main__":
    main(*sys.argv[1:])
