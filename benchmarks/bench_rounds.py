"""Kernel solves to a stationarity of 1e-6 over a grid of problems, structures, strengths and ridges.

Newton's method beside Anderson's extrapolation and the plain alternation, each given up after 3,000 steps.
"""

import argparse
import itertools
import re
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from rich.console import Console

import adaptive_tangents as at
from common import OUT, drawn, write

ALLOWED = 60
CAP = 3000
TITLE = f"kernel solves to stationarity 1e-6; given up after {CAP} steps"
SOLVERS = ("newton", "anderson", "alternation")
STRENGTHS = (1.0, 0.05, 0.01)
RIDGES = (0.0, 0.1)

# Samples n and widths. On the first, with ‖r‖ = 16, the alternation was first seen to be slow; the others keep its size of
# targets, 4 an output, so that adaptation is as strong.
PROBLEMS = {
    "n = 8, 6-9-7-2": (8, (6, 9, 7, 2)),
    "n = 30, 10-15-15-2": (30, (10, 15, 15, 2)),
    "n = 100, 20-20-15-1": (100, (20, 20, 15, 1)),
}
STRUCTURES: dict[str, Callable[[float], at.structures.Structure]] = {
    "TwoSided": lambda strength: at.TwoSided(at.Quadratic(strength)),
    "TwoSided, Absolute": lambda strength: at.TwoSided(at.Absolute(strength)),
    "Left": lambda strength: at.Left(at.Quadratic(strength)),
    "Right": lambda strength: at.Right(at.Quadratic(strength)),
    "Rows": lambda strength: at.Rows(at.Quadratic(strength)),
    "Diagonal": lambda strength: at.Diagonal(at.Quadratic(strength)),
    "Full": lambda strength: at.Full(at.Quadratic(strength)),
}  # fmt: skip


def problem(n: int, widths: tuple[int, ...]) -> tuple[at.TangentFeatures, torch.Tensor]:
    """Random inputs of a tanh network, and random targets of size 4 an output."""
    torch.manual_seed(0)
    layers: list[torch.nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [torch.nn.Linear(before, after), torch.nn.Tanh()]
    feats = at.tangent_features(
        torch.nn.Sequential(*layers[:-1]).double(), torch.randn(n, widths[0], dtype=torch.float64)
    )
    r = torch.randn(n, widths[-1], dtype=torch.float64)
    return feats, 4 * r.numel() ** 0.5 * r / r.norm()


def solve(
    feats: at.TangentFeatures, r: torch.Tensor, structure: at.structures.Structure, ridge: float, solver: Any
) -> dict[str, Any]:
    started = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", at.TangentWarning)
        found = at.fit(feats, r, structure=structure, ridge=ridge, tol=1e-12, max_rounds=CAP, solver=solver)
    return {
        "rounds": found.rounds,
        "steps": len(found.history),
        "products": sum(entry.products for entry in found.history),
        "objective": found.objective,
        "stationarity": found.stationarity,
        "converged": found.converged,
        "reason": found.reason,
        "seconds": time.perf_counter() - started,
    }


def cases(wanted: str) -> Iterator[tuple[str, str, float, float]]:
    for size, structure in itertools.product(PROBLEMS, STRUCTURES):
        if re.search(wanted, f"{size}: {structure}"):
            for ridge, strength in itertools.product(RIDGES, STRENGTHS):
                yield size, structure, ridge, strength


def cell(row: dict[str, Any]) -> str:
    if row["converged"]:
        return str(row["rounds"])
    return f"> {CAP}" if row["steps"] > CAP else f"{row['rounds']}, stuck at {row['stationarity']:.0e}"


def report(rows: list[dict[str, Any]]) -> list[list[str]]:
    """Print what was found; returns the table's cells."""
    cells = [["problem", "structure", "ρ", "λ", *SOLVERS, "newton steps", "products", "objective beside newton's"]]
    for row in rows:
        newton = row["newton"]
        # Structures that are not convex have several minima, and solvers may end in different ones.
        others = {
            s: row[s]["objective"] / newton["objective"] - 1 for s in SOLVERS[1:] if s in row and row[s]["converged"]
        }
        apart = ", ".join(f"{solver} {excess:+.1%}" for solver, excess in others.items() if abs(excess) > 1e-6)
        cells.append([
            row["problem"], row["structure"], f"{row['ridge']:g}", f"{row['strength']:g}",
            *(cell(row[solver]) if solver in row else "" for solver in SOLVERS), str(newton["steps"]),
            str(newton["products"]), apart,
        ])  # fmt: skip
    Console(width=170).print(drawn(TITLE, cells))
    over = [row for row in rows if not row["newton"]["converged"] or row["newton"]["rounds"] > ALLOWED]
    print(f"newton within {ALLOWED} kernel solves: {len(rows) - len(over)} of {len(rows)} cases")
    for row in over:
        name = f"{row['problem']}, {row['structure']}, ρ = {row['ridge']:g}, λ = {row['strength']:g}"
        print(f"  exceeds {ALLOWED}: {name}: {cell(row['newton'])} ({row['newton']['reason']})")
    hard = [row for row in rows if row.get("alternation", {"steps": 0})["steps"] >= 700]
    if hard:
        most = max(row["newton"]["rounds"] for row in hard)
        print(f"of the {len(hard)} cases where the alternation takes 700 rounds or more, newton takes at most {most}")
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--matching", default="", help="only where this regular expression is found in 'problem: structure'"
    )
    parser.add_argument(
        "--peers", default=r"n = 8.*TwoSided$", metavar="REGEX",
        help="where the other two run too, which take most of the time; '' is everywhere (default: %(default)s)",
    )  # fmt: skip
    arguments = parser.parse_args()
    made = {size: problem(*shape) for size, shape in PROBLEMS.items()}
    rows = []
    for size, structure, ridge, strength in cases(arguments.matching):
        row: dict[str, Any] = {"problem": size, "structure": structure, "ridge": ridge, "strength": strength}
        solvers = SOLVERS if re.search(arguments.peers, f"{size}: {structure}") else SOLVERS[:1]
        for solver in solvers:
            row[solver] = solve(*made[size], STRUCTURES[structure](strength), ridge, solver)
        rows.append(row)
        took = ", ".join(f"{solver} {cell(row[solver])}" for solver in solvers)
        print(f"{size}, {structure}, ρ = {ridge:g}, λ = {strength:g}: {took}", flush=True)
    cells = report(rows)
    write(OUT / f"bench_rounds{'-some' if arguments.matching else ''}.json", TITLE, cells, rows=rows)


if __name__ == "__main__":
    main()
