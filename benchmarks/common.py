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
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from adaptive_tangents import __version__
from counting import peak_rate

OUT = Path("runs") / "benchmarks"
PEERS = {"nngeometry": "nngeometry", "curvlinops-for-pytorch": "curvlinops", "asdfghjkl": "asdl", "xrfm": "xrfm"}


def contend(
    script: str,
    contenders: Mapping[str, Callable[[], dict[str, Any]]],
    title: str,
    columns: Sequence[str],
    summary: Callable[[dict[str, dict[str, Any]]], dict[str, dict[str, Any]]] = lambda rows: {},
) -> None:
    """Run every contender, or the one named by --only; print the table and write it as JSON.

    Contenders are named "network: contender", the first of each network being the one that others are compared with.
    ``summary`` makes last rows of the others.
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
    rows |= summary(rows)
    console = Console(width=160)
    cells = table_of(columns, rows)
    console.print(drawn(title, cells))
    for name, row in rows.items():
        if "blocks" in row:
            blocks = {block["block"]: block for block in row["blocks"]}
            console.print(drawn(f"{name}, by block", table_of(list(row["blocks"][0])[1:], blocks)))
    print(json.dumps(machine()))
    path = OUT / f"{Path(script).stem}{'-some' if arguments.matching else ''}.json"
    kept = {name: {k: v for k, v in row.items() if k != "entries"} for name, row in rows.items()}
    write(path, title, cells, rows=kept)


def compare(rows: Mapping[str, dict[str, Any]]) -> None:
    """Times the seconds of the first of its network, and how far kernels differ, as a part of the largest entry."""
    first: dict[str, dict[str, Any]] = {}
    for name, row in rows.items():
        base = first.setdefault(name.partition(":")[0], row)
        if row is base or "seconds" not in row or "seconds" not in base:
            continue
        row["× ours"] = row["seconds"] / base["seconds"]
        if row["× ours"] < 1 and base is rows.get(f"{name.partition(':')[0]}: adaptive-tangents"):
            row["note"] = "FASTER THAN OURS"
        if "entries" in row and "entries" in base:
            pairs = list(zip(row["entries"], base["entries"], strict=True))
            row["difference"] = f"{max(abs(a - b) for a, b in pairs) / max(abs(b) for _, b in pairs):.0e}"


def table_of(columns: Sequence[str], rows: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """The cells of a table, its headings first; columns that say nothing are left out."""
    told = {name: next((f"{k}: {row[k]}" for k in ("failed", "skipped") if k in row), "") for name, row in rows.items()}
    used = [c for c in columns if any(c in row for row in rows.values())]
    cells = [[name, *([told[name]] if told[name] else [show(row.get(c)) for c in used])] for name, row in rows.items()]
    return [["", *used], *cells]


def write(path: Path, title: str, cells: list[list[str]], **results: Any) -> None:
    """Keep what a script measured, and the table of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = {"title": title, "date": time.strftime("%Y-%m-%d"), "machine": machine(), "table": cells} | results
    path.write_text(json.dumps(kept, indent=1))
    print(f"written: {path}\n")


def drawn(title: str, cells: list[list[str]]) -> Table:
    """A table of cells, its headings first, for the terminal."""
    made = Table(title=title)
    for heading in cells[0]:
        made.add_column(heading, justify="right" if heading else "left")
    for row in cells[1:]:
        made.add_row(*row)
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
    """What a table was measured on, and the versions of what took part."""
    return {
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "processor": processor(),
        "GFLOP/s in products of 2048": round(peak_rate() / 1e9),
        "torch": metadata.version("torch"),
        "adaptive-tangents": __version__,
    } | {name: metadata.version(name) for name in PEERS if find_spec(PEERS[name])}


def processor() -> str:
    """The processor's kind, and its name where Linux tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    told = re.search(r"^model name\s*: (.+)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else None
    return f"{platform.machine()} {told[1].strip()}" if told else platform.machine()


def show(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) else str(value)
