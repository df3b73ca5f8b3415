"""Does memory stay below ``memory_limit``? What a process grows by in ``tangent_kernel``, beside the limit asked for."""

import threading
import time
from pathlib import Path

import adaptive_tangents as at
from common import contend
from networks import NETWORKS, made


def held() -> int:
    """Bytes of memory this process holds now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def measure(name: str, megabytes: int) -> dict[str, object]:
    model, x = made(NETWORKS[name])
    limit, most, done = megabytes * 1_000_000, 0, threading.Event()
    at.tangent_kernel(model, x[:2])  # what libraries set up once is not the kernel's
    before = held()

    def watch() -> None:
        nonlocal most
        while not done.wait(0.002):
            most = max(most, held())

    watcher = threading.Thread(target=watch)
    watcher.start()
    started, refusal = time.perf_counter(), ""
    try:
        at.tangent_kernel(model, x, memory_limit=limit)
    except at.TangentError as error:
        refusal = str(error)
    seconds = time.perf_counter() - started
    done.set()
    watcher.join()
    grown = (most - before) / 1e6
    row: dict[str, object] = {"limit MB": megabytes, "grown MB": grown, "of the limit": grown / megabytes}
    verdict = f"refused: {refusal}" if refusal else "ABOVE THE LIMIT" if most - before > limit else "below"
    return row | {"seconds": seconds, "verdict": verdict}


contenders = {
    f"{name}, {megabytes} MB: adaptive-tangents": lambda name=name, megabytes=megabytes: measure(name, megabytes)
    for name in NETWORKS
    for megabytes in (200, 1000, 4000)
}

if __name__ == "__main__":
    contend(
        __file__, contenders, "memory grown by tangent_kernel(..., memory_limit=)",
        ("limit MB", "grown MB", "of the limit", "seconds", "verdict"),
    )  # fmt: skip
