"""The exact fit beside gradient methods on the joint problem it solves: L-BFGS and Adam over inner parameters and transforms.

All minimize ‖θ‖² + Ω(M) + (1/ρ)Σ‖r − φMᵀθ‖² over θ and two sides a block, without constraints, in float64, with features in
factors. The peers' Ω is λ‖M_L − I‖² + λ‖M_R − I‖²: the same where a side is symmetric and at least I, as at an optimum, never
less than λΣ(σ_j − 1)², and smooth, so that a step of theirs needs no decomposition.
"""

import argparse
import math
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

import adaptive_tangents as at
from bench_fit import problem
from bench_rounds import PROBLEMS
from bench_rounds import problem as random_problem
from common import OUT, drawn, write

STRENGTH, CLOSE = 1.0, 1e-4
# Of ρ = 10^k, the one with the least leave-one-out error of the kernel that does not adapt.
RIDGE = 0.1
RATES = (3e-4, 1e-3, 3e-3, 1e-2)


@dataclass
class Trace:
    """The least objective with the seconds it took; raises StopIteration at ``goal``, and after ``limit`` on its clock."""

    goal: float
    limit: float
    clock: Callable[[], float] = time.perf_counter
    started: float = field(default_factory=time.perf_counter)
    processor: float = field(default_factory=time.process_time)
    best: float = math.inf
    evaluations: int = 0
    entries: list[tuple[float, float]] = field(default_factory=list)

    def hear(self, objective: float) -> None:
        self.evaluations += 1
        self.best = min(self.best, objective)
        seconds = self.clock() - (self.processor if self.clock is time.process_time else self.started)
        self.entries.append((seconds, self.best))
        if self.best <= self.goal or seconds > self.limit:
            raise StopIteration


class Joint:
    """The joint objective, contracted as cheaply as it can be: B = M_LᵀΘM_R, then δᵀBh of every sample."""

    def __init__(self, feats: at.TangentFeatures, r: Tensor, strength: float, ridge: float) -> None:
        outers = [block.outer for block in feats.to(torch.float64).blocks.values()]
        assert all(outer is not None and outer.inputs.shape[1] == 1 for outer in outers)
        self.factors = [(o.backward[:, 0].contiguous(), o.inputs[:, 0].contiguous()) for o in outers if o is not None]
        self.r, self.strength, self.ridge = r.double(), strength, ridge

    def start(self, seed: int = 0) -> list[tuple[Tensor, Tensor, Tensor]]:
        """M = I, and θ small but not zero, where the sides would have no gradient."""
        generator = torch.Generator().manual_seed(seed)
        made = []
        for backward, inputs in self.factors:
            o, i = backward.shape[2], inputs.shape[1]
            theta = 1e-3 * torch.randn(o, i, generator=generator, dtype=torch.float64)
            made.append((theta, torch.eye(o, dtype=torch.float64), torch.eye(i, dtype=torch.float64)))
        return [tuple(x.requires_grad_() for x in block) for block in made]  # type: ignore[misc]

    def __call__(self, blocks: list[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
        outputs, penalty = torch.zeros_like(self.r), torch.zeros((), dtype=torch.float64)
        for (theta, left, right), (backward, inputs) in zip(blocks, self.factors, strict=True):
            matrix = left.mT @ theta @ right  # (o, i)
            outputs = outputs + (backward @ (inputs @ matrix.mT)[:, :, None])[..., 0]  # (n, c)
            penalty = penalty + (theta**2).sum()
            for side in (left, right):
                away = side - torch.eye(len(side), dtype=side.dtype)
                penalty = penalty + self.strength * (away**2).sum()
        return penalty + ((self.r - outputs) ** 2).sum() / self.ridge


def lbfgs(joint: Joint, trace: Trace, history: int = 20) -> None:
    """L-BFGS of torch with the strong Wolfe line search, until it stops moving, is there, or out of time."""
    blocks = joint.start()
    flat = [x for block in blocks for x in block]
    optimizer = torch.optim.LBFGS(
        flat, lr=1.0, max_iter=10**6, max_eval=10**7, history_size=history, line_search_fn="strong_wolfe",
        tolerance_grad=1e-12, tolerance_change=0.0,
    )  # fmt: skip

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = joint(blocks)
        value.backward()
        trace.hear(value.item())
        return value

    with suppress(StopIteration):
        optimizer.step(closure)


def adam(joint: Joint, trace: Trace, rate: float) -> None:
    """Adam, its rate halved where 100 steps have not lowered the least objective by 1e-5 of itself."""
    blocks = joint.start()
    optimizer = torch.optim.Adam([x for block in blocks for x in block], lr=rate, foreach=True)
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=100, threshold=1e-5)
    with suppress(StopIteration):
        while optimizer.param_groups[0]["lr"] > 1e-7 * rate:
            optimizer.zero_grad()
            value = joint(blocks)
            value.backward()
            trace.hear(value.item())
            optimizer.step()
            schedule.step(value.item())


def ours(feats: at.TangentFeatures, r: Tensor, strength: float, ridge: float) -> tuple[at.Fit, dict[str, Any]]:
    started, processor = time.perf_counter(), time.process_time()
    found = at.fit(feats, r, structure=at.TwoSided(at.Quadratic(strength)), ridge=ridge, tol=1e-12, max_rounds=1000)
    seconds = time.perf_counter() - started
    return found, {
        "seconds": seconds,
        "processor": time.process_time() - processor,
        "objective": found.objective,
        "excess": 0.0,
        "evaluations": f"{found.rounds} kernel solves, {len(found.history)} steps",
        "stationarity": found.stationarity,
        "rounds": found.rounds,
        "timings": {name: taken / seconds for name, taken in found.timings.items()},
        "history": [(entry.seconds, entry.objective, entry.temper) for entry in found.history],
        # Of the tempered stages the objective is another one, so that they count as not yet within.
        "within": next(
            e.seconds for e in found.history if e.temper == 1 and e.objective <= found.objective * (1 + CLOSE)
        ),
    }


def peer(
    run: Callable[[Trace], None], *, least: float, close: float, limit: float, clock: Callable[[], float]
) -> dict[str, Any]:
    """A peer's row: until within ``close`` relative of the least objective known, or ``limit`` seconds of a clock."""
    trace = Trace(least * (1 + close), limit, clock)
    run(trace)
    return {
        "seconds": time.perf_counter() - trace.started,
        "processor": time.process_time() - trace.processor,
        "objective": trace.best,
        "excess": trace.best / least - 1,
        "evaluations": trace.evaluations,
        "reached": trace.best <= trace.goal,
        "within": time.perf_counter() - trace.started if trace.best <= trace.goal else None,
        "trace": trace.entries[:: max(1, len(trace.entries) // 500)],
    }


def check() -> None:
    """On a problem small enough for everyone all three reach one objective, to 1e-6."""
    feats, r = random_problem(*PROBLEMS["n = 8, 6-9-7-2"])
    r = r / 4
    joint = Joint(feats, r, STRENGTH, RIDGE)
    found, row = ours(feats, r, STRENGTH, RIDGE)
    rows = {"ours": row}
    contenders: dict[str, Callable[[Trace], None]] = {
        "L-BFGS": lambda trace: lbfgs(joint, trace),
        "Adam": lambda trace: adam(joint, trace, 1e-2),
    }
    for name, run in contenders.items():
        rows[name] = peer(run, least=found.objective, close=-1.0, limit=60, clock=time.process_time)
    for name, row in rows.items():
        print(f"check, {name}: objective {row['objective']:.12g}, excess {row['excess']:.1e}")
        assert abs(row["excess"]) < 1e-6, name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=500)
    parser.add_argument("--times", type=float, default=30.0, help="give a peer up after so many times our seconds")
    parser.add_argument("--limit", type=float, default=math.inf, help="and after so many seconds")
    parser.add_argument("--check", action="store_true", help="only the comparison on the small problem")
    parser.add_argument(
        "--processor", action="store_true", help="count processor seconds: on a shared machine, with OMP_NUM_THREADS=1"
    )
    arguments = parser.parse_args()
    check()
    if arguments.check:
        return
    feats, r = problem(arguments.samples, 10)
    found, row = ours(feats, r, STRENGTH, RIDGE)
    rows = {"exact fit": row}
    shares = ", ".join(f"{name} {share:.0%}" for name, share in row["timings"].items())
    print(f"{found.summary()}\nshares of its seconds: {shares}", flush=True)
    joint = Joint(feats, r, STRENGTH, RIDGE)
    clock = time.process_time if arguments.processor else time.perf_counter
    limit = min(arguments.times * row["processor" if arguments.processor else "seconds"], arguments.limit)
    options = {"least": found.objective, "close": CLOSE, "clock": clock}

    def told(name: str, run: Callable[[Trace], None], limit: float) -> dict[str, Any]:
        made = peer(run, limit=limit, **options)
        print(
            f"{name}: excess {made['excess']:.2e} in {made['seconds']:.0f} s, {made['processor']:.0f} processor s, "
            f"{made['evaluations']} evaluations",
            flush=True,
        )
        return made

    rows["L-BFGS on (J)"] = told("L-BFGS", lambda trace: lbfgs(joint, trace), limit)
    trials = {
        rate: told(f"Adam, rate {rate:g}", lambda trace, rate=rate: adam(joint, trace, rate), limit / 20)
        for rate in RATES
    }
    best = min(trials, key=lambda rate: trials[rate]["objective"])
    rows[f"Adam on (J), rate {best:g}"] = told(f"Adam, rate {best:g}", lambda trace: adam(joint, trace, best), limit)
    title = f"min of (J), MLP 784-256-256-10, n = {arguments.samples}, TwoSided(Quadratic({STRENGTH:g})), ρ = {RIDGE:g}"
    cells = [[
        "", "seconds", "× ours", "processor s", "× ours", "evaluations", "objective", "excess", f"seconds to {CLOSE:g}",
        "× ours",
    ]]  # fmt: skip
    for name, found_row in rows.items():
        cells.append([
            name, f"{found_row['seconds']:.1f}", f"{found_row['seconds'] / row['seconds']:.1f}",
            f"{found_row['processor']:.1f}", f"{found_row['processor'] / row['processor']:.1f}",
            str(found_row["evaluations"]), f"{found_row['objective']:.6f}", f"{found_row['excess']:.1e}",
            "not reached" if found_row["within"] is None else f"{found_row['within']:.1f}",
            f"> {found_row['seconds'] / row['within']:.0f}" if found_row["within"] is None
            else f"{found_row['within'] / row['within']:.1f}",
        ])  # fmt: skip
    Console(width=150).print(drawn(title, cells))
    write(OUT / "bench_joint.json", title, cells, rows=rows, rates=trials)


if __name__ == "__main__":
    main()
