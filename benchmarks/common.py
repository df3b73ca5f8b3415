"""What the benchmarks share: each contender runs in a process of its own, so that times and peak memory are its alone."""

import argparse
import json
import os
import platform
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

OUT = Path("runs") / "benchmarks"


def contend(
    script: str, contenders: Mapping[str, Callable[[], dict[str, Any]]], title: str, columns: Sequence[str]
) -> None:
    """Run every contender, or the one named by --only; print the table and write it as JSON.

    Contenders are named "network: contender", the first of each network being the one that others are compared with.
    """
    parser = argparse.ArgumentParser(description=title)
    parser.add_argument("--only", choices=contenders, help="run this one here and print its row as JSON")
    parser.add_argument("--patience", type=float, default=300, help="seconds after which a contender is given up")
    parser.add_argument("--matching", default="", help="run those that this regular expression is found in")
    arguments = parser.parse_args()
    if arguments.only:
        row = contenders[arguments.only]()
        row.setdefault("peak GB", peak_memory())
        print(json.dumps(row))
        return
    rows: dict[str, dict[str, Any]] = {}
    for name in contenders:
        if not re.search(arguments.matching, name):
            continue
        print(f'$ python {Path(script).parent.name}/{Path(script).name} --only "{name}"', flush=True)
        command = [sys.executable, "-W", "ignore", script, "--only", name]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=arguments.patience)
        except subprocess.TimeoutExpired:
            rows[name] = {"failed": f"given up after {arguments.patience:g} s"}
            continue
        if done.returncode == 0:
            rows[name] = json.loads(done.stdout.strip().splitlines()[-1])
        else:
            rows[name] = {"failed": (done.stderr.strip().splitlines() or [f"ended with {done.returncode}"])[-1]}
    compare(rows)
    console = Console(width=160)
    console.print(table(title, columns, rows))
    for name, row in rows.items():
        if "blocks" in row:
            console.print(
                table(f"{name}, by block", list(row["blocks"][0])[1:], {b["block"]: b for b in row["blocks"]})
            )
    print(json.dumps(machine()))
    OUT.mkdir(parents=True, exist_ok=True)
    path = OUT / f"{Path(script).stem}{'-some' if arguments.matching else ''}.json"
    kept = {name: {k: v for k, v in row.items() if k != "entries"} for name, row in rows.items()}
    path.write_text(json.dumps({"title": title, "machine": machine(), "rows": kept}, indent=1))
    print(f"written: {path}\n")


def compare(rows: Mapping[str, dict[str, Any]]) -> None:
    """Times the seconds of the first of its network, and how far kernels differ, as a part of the largest entry."""
    first: dict[str, dict[str, Any]] = {}
    for name, row in rows.items():
        base = first.setdefault(name.partition(":")[0], row)
        if row is base or "seconds" not in row or "seconds" not in base:
            continue
        row["× ours"] = row["seconds"] / base["seconds"]
        if row["× ours"] < 1:
            row["note"] = "FASTER THAN OURS"
        if "entries" in row and "entries" in base:
            pairs = list(zip(row["entries"], base["entries"], strict=True))
            row["difference"] = f"{max(abs(a - b) for a, b in pairs) / max(abs(b) for _, b in pairs):.0e}"


def table(title: str, columns: Sequence[str], rows: Mapping[str, Mapping[str, Any]]) -> Table:
    made = Table(title=title)
    for heading in ("", *columns):
        made.add_column(heading, justify="right" if heading else "left")
    for name, row in rows.items():
        word = next((f"{key}: {row[key]}" for key in ("failed", "skipped") if key in row), None)
        made.add_row(name, *([show(row.get(c)) for c in columns] if word is None else [word]))
    return made


def peak_memory() -> float:
    """The most memory this process has held, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def best_of(function: Callable[[], Any], *, repeats: int = 5, warm: int = 1) -> float:
    """Least seconds of several calls: noise of other work on the machine only ever adds."""
    for _ in range(warm):
        function()
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def machine() -> dict[str, Any]:
    return {
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "processor": platform.machine(),
        "torch": metadata.version("torch"),
        "adaptive-tangents": metadata.version("adaptive-tangents"),
    }


def show(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) else str(value)
