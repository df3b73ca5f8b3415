"""What a kernel solve of the exact fit costs as samples grow, beside the operations counted for it; a table and a figure.

A solve makes the adapted kernel K_M (nc, nc) and its Cholesky factor; what else a step needs, the decompositions of the
coefficients and the products with features and factor, stands beside it.
"""

import argparse
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from rich.console import Console

import adaptive_tangents as at
from adaptive_tangents.datasets.images import load_digits, normalize_digits
from adaptive_tangents.experiments.training import relu_network
from adaptive_tangents.linalg.cholesky import factorize
from adaptive_tangents.reporting.drawing import COLORS, DASHES, grid, render
from adaptive_tangents.runs.results import Arrays, Results
from common import OUT, drawn, write

PARTS = ("kernel", "Cholesky", "decompositions", "solve and products")
COUNTED = ("kernel", "Cholesky")
REPEATS = 3
RIDGE = 0.1


def problem(n: int, c: int) -> tuple[at.TangentFeatures, torch.Tensor]:
    """All ten digits, told apart by c = 10 outputs, or odd from even by one."""
    digits = load_digits("mnist5k")
    labels = digits.train_labels[:n]
    y = (labels % 2 * 2.0 - 1)[:, None] if c == 1 else torch.eye(10)[labels] - 0.1
    network = relu_network(
        (784, 256, 256, c), ("h1", "h2", "out"), bias=True, generator=torch.Generator().manual_seed(0)
    )
    x = normalize_digits(digits.train_images[:n])
    with torch.no_grad():
        r = y - network(x)
    return at.tangent_features(network, x).to(torch.float64), r.double()


def measure(n: int, c: int, clock: Callable[[], float]) -> dict[str, Any]:
    feats, r = problem(n, c)
    structure, size = at.TwoSided(at.Quadratic(1.0)), n * c
    # A transform as the fit has it, from coefficients of the size it works at: one step from the kernel that does not adapt.
    beta = feats.combine(torch.cholesky_solve(r.reshape(-1, 1), factor_of(feats)).reshape(n, c))
    transforms = structure.update(beta)

    seconds = dict.fromkeys(PARTS, math.inf)
    for _ in range(REPEATS):
        took = [clock()]
        adapted = feats.transformed(transforms)
        matrix = adapted.kernel().reshape(size, size)
        took.append(clock())
        factor = factorize(matrix, RIDGE)
        took.append(clock())
        structure.solution(beta)
        took.append(clock())
        alpha = factor.solve(r.flatten())
        feats.inner(feats.combine(alpha.reshape(n, c)))
        took.append(clock())
        for part, before, after in zip(PARTS, took, took[1:], strict=False):
            seconds[part] = min(seconds[part], after - before)
    operations = {"kernel": adapting(feats, transforms) + adapted.plan().operations, "Cholesky": size**3 / 3}
    return {
        "n": n,
        "c": c,
        "seconds": seconds,
        "operations": operations,
        "routes": [b.route for b in adapted.plan().blocks],
    }


def adapting(feats: at.TangentFeatures, transforms: Mapping[str, Any]) -> int:
    """Operations of δ → M_Lδ and h → M_Rh, a side the identity plus k directions: 4dk a row of width d."""
    total = 0
    for name, sides in transforms.items():
        (o, i), t = feats.blocks[name].shape, feats.blocks[name].positions
        total += 4 * feats.n * t * (feats.c * o * sides.left.gains.numel() + i * sides.right.gains.numel())
    return total


def factor_of(feats: at.TangentFeatures) -> torch.Tensor:
    size = feats.n * feats.c
    return factorize(feats.kernel().reshape(size, size), RIDGE).factor


def slope(n: list[int], values: list[float]) -> float:
    """The exponent of n that values grow with, by least squares."""
    return float(np.polyfit(np.log(n), np.log(values), 1)[0])


def exponent(rows: list[dict[str, Any]], value: Callable[[dict[str, Any]], float]) -> float:
    return slope([row["n"] for row in rows], [value(row) for row in rows])


def solve_seconds(row: dict[str, Any]) -> float:
    return sum(row["seconds"][part] for part in COUNTED)


def all_operations(row: dict[str, Any]) -> float:
    return sum(row["operations"].values())


def draw(results: Results, arrays: Arrays) -> Figure:
    """Seconds a kernel solve against n, with the counted operations at one speed."""
    shown = sorted({row["c"] for row in results["rows"]})
    figure, (panels,) = grid(1, len(shown), 3.9)
    for axes, c in zip(panels, shown, strict=True):
        rows = [row for row in results["rows"] if row["c"] == c]
        n = [row["n"] for row in rows]
        for part, color in zip(COUNTED, COLORS, strict=False):
            measured, counted = ([row[kind][part] for row in rows] for kind in ("seconds", "operations"))
            speed = max(k / s for k, s in zip(counted, measured, strict=True))
            name, words = f"{part}, n to the {slope(n, measured):.2f}", f"counted, at {speed / 1e9:.0f} GFLOP/s"
            axes.plot(n, measured, "o-", color=color, lw=2, label=name)
            axes.plot(
                n, [k / speed for k in counted], color=color, lw=1.2, ls=DASHES,
                label=f"{words}, n to the {slope(n, counted):.2f}",
            )  # fmt: skip
        axes.set(xscale="log", yscale="log", xlabel="samples n", ylabel=f"{results['clock']} seconds")
        axes.set_xticks(n, [str(k) for k in n])
        axes.set_xticks([], minor=True)
        axes.set_title(f"One kernel solve, c = {c}", loc="left")
        axes.legend(loc="upper left")
        axes.set_ylim(None, 30 * max(row["seconds"][part] for row in rows for part in COUNTED))
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, nargs="+", default=[250, 500, 1000])
    parser.add_argument("--outputs", type=int, nargs="+", default=[1, 10], choices=[1, 10])
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument(
        "--processor", action="store_true", help="count processor seconds: on a shared machine, with OMP_NUM_THREADS=1"
    )
    arguments = parser.parse_args()
    clock = time.process_time if arguments.processor else time.perf_counter
    rows = [measure(n, c, clock) for c in arguments.outputs for n in arguments.samples]
    title = "a kernel solve, MLP 784-256-256-c, TwoSided, float64"
    cells = [["", *(f"{part} s" for part in PARTS), "solve s", *(f"{part} GFLOP" for part in COUNTED), "GFLOP/s"]]
    for row in rows:
        cells.append([
            f"n = {row['n']}, c = {row['c']}", *(f"{row['seconds'][part]:.3g}" for part in PARTS),
            f"{solve_seconds(row):.3g}", *(f"{row['operations'][part] / 1e9:.3g}" for part in COUNTED),
            f"{all_operations(row) / solve_seconds(row) / 1e9:.3g}",
        ])  # fmt: skip
    Console(width=150).print(drawn(title, cells))
    for c in arguments.outputs:
        group = [row for row in rows if row["c"] == c]
        if len(group) > 1:
            print(
                f"c = {c}: a kernel solve takes time as n to the {exponent(group, solve_seconds):.2f}, "
                f"its counted operations grow as n to the {exponent(group, all_operations):.2f}"
            )
    results = {"rows": rows, "clock": "processor" if arguments.processor else "wall"}
    write(arguments.out / "bench_growth.json", title, cells, **results)
    drawing = render(draw, "growth", results, {})
    (arguments.out / "bench_growth.png").write_bytes(drawing.png)
    (arguments.out / "bench_growth.svg").write_text(drawing.svg)
    print(f"written: {arguments.out}/bench_growth.png, .svg\n")


if __name__ == "__main__":
    main()
