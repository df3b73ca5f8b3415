"""``python -m adaptive_tangents``, and ``torchrun -m adaptive_tangents``: the command line."""

from adaptive_tangents.cli import app

if __name__ == "__main__":
    app()
