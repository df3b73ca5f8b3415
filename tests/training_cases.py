"""Checkpoints as other libraries' trainers leave them, at tiny widths; each is skipped if its library is absent."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from adaptive_tangents.loading.hugging_face import quiet

WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "fine", "poor", "film", "book", "a", "the", "##s")
TEXTS = (
    "a good film",
    "the bad book",
    "a fine book",
    "the poor film",
    "good books",
    "bad films",
    "fine",
    "a poor book",
)
LABELS = (1, 0, 1, 0, 1, 0, 1, 0)


def library(name: str) -> Any:
    return pytest.importorskip(name, reason=f"{name} is not installed")


def bert_config(**options: Any) -> Any:
    transformers = library("transformers")
    labels = {"id2label": {0: "bad", 1: "good"}, "label2id": {"bad": 0, "good": 1}}
    return transformers.BertConfig(
        vocab_size=len(WORDS), hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12,
        max_position_embeddings=16, **{**labels, **options},
    )  # fmt: skip


def bert(seed: int = 0) -> Any:
    transformers = library("transformers")
    torch.manual_seed(seed)
    model = transformers.BertForSequenceClassification(bert_config())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.4 * torch.randn_like(parameter))
    return model


def tokenizer(folder: Path) -> Any:
    transformers = library("transformers")
    path = folder / "words.txt"
    path.write_text("\n".join(WORDS))
    made = transformers.BertTokenizerFast(vocab={word: k for k, word in enumerate(WORDS)})
    path.unlink()
    return made


def encoded(made: Any) -> dict[str, Tensor]:
    given = made(list(TEXTS), padding="longest", return_tensors="pt")
    return {name: given[name] for name in ("input_ids", "attention_mask", "token_type_ids")}


def save_tokens(path: Path, tokens: dict[str, Tensor]) -> Path:
    arrays: dict[str, Any] = {name: value.numpy() for name, value in tokens.items()}
    np.savez(path, y=np.resize(LABELS, len(next(iter(arrays.values())))), **arrays)
    return path


class _Rows(torch.utils.data.Dataset[Any]):
    def __init__(self, tokens: dict[str, Tensor]) -> None:
        self.tokens = tokens

    def __len__(self) -> int:
        return len(LABELS)

    def __getitem__(self, k: int) -> dict[str, Any]:
        return {name: value[k] for name, value in self.tokens.items()} | {"labels": LABELS[k]}


def trained(folder: Path, model: Any, tokens: dict[str, Tensor], made: Any, *, steps: int = 4) -> Path:
    """A folder as transformers' Trainer leaves it: checkpoint-0 saved before, then one every two steps."""
    transformers = library("transformers")
    library("accelerate")
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=4, learning_rate=3e-2, save_strategy="steps",
        save_steps=2, logging_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True, seed=0,
    )  # fmt: skip
    trainer = transformers.Trainer(model, arguments, train_dataset=_Rows(tokens), processing_class=made)
    trainer.save_model(str(folder / "checkpoint-0"))
    with quiet():
        trainer.train()
    return folder


def lora(model: Any, **options: Any) -> Any:
    peft = library("peft")
    config = peft.LoraConfig(task_type="SEQ_CLS", r=2, lora_alpha=4, target_modules=["query", "value"], **options)
    return peft.get_peft_model(model, config)


class Net(nn.Module):
    """A small convolutional network, and what Lightning trains."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3)
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.stem(x)).mean((2, 3)))


def net() -> nn.Module:
    """The factory that --model names."""
    return Net()


def images(n: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, 1, 6, 6, generator=generator), torch.arange(n) % 3


def save_images(path: Path) -> Path:
    x, y = images()
    np.savez(path, x=x.numpy(), y=y.numpy())
    return path


def lightning_run(folder: Path) -> list[Path]:
    """Lightning's checkpoints after each of three epochs."""
    lightning = library("lightning")

    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self, width: int = 4, rate: float = 0.1) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.model = Net(width)
            self.weights = nn.Parameter(torch.ones(3), requires_grad=False)

        def training_step(self, batch: Any, index: int) -> Tensor:
            x, y = batch
            return nn.functional.cross_entropy(self.model(x), y, weight=self.weights)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.model.parameters(), lr=0.5)

    torch.manual_seed(0)
    saving = lightning.pytorch.callbacks.ModelCheckpoint(dirpath=str(folder), save_top_k=-1, every_n_epochs=1)
    trainer = lightning.Trainer(
        max_epochs=3, callbacks=[saving], logger=False, enable_progress_bar=False, enable_model_summary=False,
        accelerator="cpu", default_root_dir=str(folder),
    )  # fmt: skip
    trainer.fit(Module(), DataLoader(TensorDataset(*images()), batch_size=4))
    return sorted(folder.glob("*.ckpt"))
