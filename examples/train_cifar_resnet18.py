"""Train a ResNet-18 for 32×32 images on CIFAR-10 and save the files that `adaptive-tangents inspect` reads.

    python examples/train_cifar_resnet18.py --data-dir DIR --out runs/cifar

DIR holds the binary version of CIFAR-10 (data_batch_1.bin, …, test_batch.bin), all of it or a part. The script writes
step_0000.pt (the start), one checkpoint an epoch, and data.npz with normalized test images, labels and class names.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
MEAN, DEVIATION = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


class Residual(nn.Module):
    """relu(BN(conv(relu(BN(conv(x))))) + shortcut(x))."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = nn.Sequential()
        if stride != 1 or width_in != width:
            self.shortcut = nn.Sequential(nn.Conv2d(width_in, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class ResNet(nn.Module):
    """A 3×3 stem and four stages of two residual blocks, as in He et al. (CVPR 2016) for small images."""

    def __init__(self, width: int = 64, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        stages = [
            nn.Sequential(Residual(width * max(1, k // 2), width * k, 1 + (k > 1)), Residual(width * k, width * k, 1))
            for k in (1, 2, 4, 8)
        ]
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.head = nn.Linear(8 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.stem(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.head(x.mean((2, 3)))


def resnet18() -> nn.Module:
    """The network that was trained: 11.2 million parameters."""
    return ResNet()


def read_cifar(path: Path) -> tuple[Tensor, Tensor]:
    """Images in [0, 1] (n, 3, 32, 32) and labels (n,) of one file; a record is a label byte and 3,072 pixel bytes."""
    records = torch.from_numpy(np.fromfile(path, np.uint8).reshape(-1, 3073))
    return records[:, 1:].reshape(-1, 3, 32, 32).float() / 255, records[:, 0].long()


def normalized(images: Tensor) -> Tensor:
    return (images - torch.tensor(MEAN)[:, None, None]) / torch.tensor(DEVIATION)[:, None, None]


def calibrate(model: nn.Module, x: Tensor) -> None:
    """Let the batch norms see data before training: the statistics of a new network, 0 and 1, fit no input."""
    model.train()
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None  # the plain average of the batches
    with torch.no_grad():
        for part in x.split(100):
            model(part.contiguous(memory_format=torch.channels_last))
    for norm in norms:
        norm.momentum = 0.1


def accuracy(model: nn.Module, x: Tensor, labels: Tensor) -> float:
    model.eval()
    with torch.no_grad():
        return torch.cat([model(part).argmax(1) for part in x.split(200)]).eq(labels).double().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/cifar"))
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--images", type=int, default=3000, help="training images, the first of each batch file")
    parser.add_argument("--rate", type=float, default=0.05, help="largest learning rate of the one-cycle schedule")
    parser.add_argument("--bfloat16", action="store_true", help="faster where the processor multiplies in bfloat16")
    settings = parser.parse_args()
    files = sorted(settings.data_dir.glob("data_batch_*.bin"))
    if not files:
        parser.error(f"no data_batch_*.bin in {settings.data_dir}; take CIFAR-10's binary version")
    parts = [[part[: settings.images // len(files)] for part in read_cifar(file)] for file in files]
    x, labels = (torch.cat(part) for part in zip(*parts, strict=True))
    x = normalized(x)
    test_images, test_labels = read_cifar(settings.data_dir / "test_batch.bin")
    x_test = normalized(test_images)
    settings.out.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(settings.out / "data.npz", x=x_test, y=test_labels, classes=np.array(CLASSES))
    torch.manual_seed(0)
    model = resnet18().to(memory_format=torch.channels_last)
    batch = 100
    steps = settings.epochs * (len(x) // batch)
    optimizer = torch.optim.SGD(model.parameters(), lr=settings.rate, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.rate, total_steps=steps)
    calibrate(model, x[:500])
    torch.save(model.state_dict(), settings.out / "step_0000.pt")
    began = time.perf_counter()
    log = []
    for epoch in range(settings.epochs):
        model.train()
        losses = []
        for index in torch.randperm(len(x)).split(batch)[: len(x) // batch]:
            images = torch.where(torch.rand(len(index), 1, 1, 1) < 0.5, x[index], x[index].flip(3))
            with torch.autocast("cpu", torch.bfloat16, enabled=settings.bfloat16):
                logits = model(images.contiguous(memory_format=torch.channels_last))
            loss = F.cross_entropy(logits.float(), labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        done = (epoch + 1) * (len(x) // batch)
        torch.save(model.state_dict(), settings.out / f"step_{done:04d}.pt")
        row = {
            "epoch": epoch + 1,
            "loss": sum(losses) / len(losses),
            "test_accuracy": accuracy(model, x_test, test_labels),
        }
        row["seconds"] = time.perf_counter() - began
        log.append(row)
        print("  ".join(f"{key} {value:.4g}" for key, value in row.items()), flush=True)
    (settings.out / "training.json").write_text(json.dumps(log, indent=1))


if __name__ == "__main__":
    main()
