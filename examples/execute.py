"""Run notebooks from top to bottom and keep their outputs, without the times at which they were made.

`python examples/execute.py examples/*.ipynb` needs nbclient and ipykernel.
"""

import os
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

KEPT = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python", "version": "3.11"}}  # fmt: skip


def main() -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["PYTHONWARNINGS"] = "ignore:IProgress not found"  # tqdm's advice names a path
    for path in map(Path, sys.argv[1:]):
        notebook = nbformat.read(path, as_version=4)
        began = time.monotonic()
        NotebookClient(notebook, timeout=600, kernel_name="python3", record_timing=False).execute(cwd=str(path.parent))
        notebook.metadata = nbformat.from_dict(KEPT)
        for k, cell in enumerate(notebook.cells):
            cell.id, cell.metadata = f"cell{k}", {}
        nbformat.write(notebook, path)
        print(f"{path.name}: {time.monotonic() - began:.0f} seconds, {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
