"""What the benchmarks share: each contender runs in a process of its own, so that times and peak memory are its alone."""

import argparse
import json
import os
import platform
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
    """Run every contender, or the one named by --only; print the table and write it as JSON."""
    parser = argparse.ArgumentParser(description=title)
    parser.add_argument("--only", choices=contenders, help="run this one here and print its row as JSON")
    arguments = parser.parse_args()
    if arguments.only:
        row = contenders[arguments.only]()
        row["peak GB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        print(json.dumps(row))
        return
    rows = {}
    for name in contenders:
        command = [sys.executable, script, "--only", name]
        print(f"$ python {Path(script).parent.name}/{Path(script).name} --only {name}", flush=True)
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            rows[name] = json.loads(done.stdout.strip().splitlines()[-1])
        else:
            rows[name] = {"failed": (done.stderr.strip().splitlines() or ["no message"])[-1]}
    table = Table(title=title)
    for heading in ("", *columns):
        table.add_column(heading, justify="right" if heading else "left")
    for name, row in rows.items():
        cells = [row["failed"], *[""] * (len(columns) - 1)] if "failed" in row else [show(row.get(c)) for c in columns]
        table.add_row(name, *cells)
    Console(width=140).print(table)
    print(json.dumps(machine()))
    OUT.mkdir(parents=True, exist_ok=True)
    path = OUT / f"{Path(script).stem}.json"
    path.write_text(json.dumps({"title": title, "machine": machine(), "rows": rows}, indent=1))
    print(f"written: {path}\n")


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
