"""Blocks by layer: names of real architectures, shares that sum to one, and how layers start."""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import adaptive_tangents as at
from adaptive_tangents.features.layer_names import layers_of, phrase, plain_names
from adaptive_tangents.inspection.measures import change_shares, rank_of
from adaptive_tangents.inspection.starts import from_scratch, looks_new, new_head, start_of, without_kernel


def each(pattern: str, *numbers: object) -> list[str]:
    return [pattern.format(number) for number in numbers]


# Names as the libraries' models have them, shortened to what tells layers apart, and their layers in order.
NETWORKS: dict[str, tuple[list[str], list[str]]] = {
    "transformers BertForSequenceClassification": (
        ["bert.embeddings.word_embeddings", "bert.embeddings.LayerNorm.weight", "bert.embeddings.LayerNorm.bias",
         *each("bert.encoder.layer.{}.attention.self.query", 0, 1), *each("bert.encoder.layer.{}.output.dense", 0, 1),
         "bert.pooler.dense", "classifier"],
        ["embeddings", "layer 0", "layer 1", "pooler", "head"],
    ),
    "transformers RobertaForSequenceClassification": (
        ["roberta.embeddings.position_embeddings", *each("roberta.encoder.layer.{}.attention.self.key", 0, 1, 2),
         "classifier.dense", "classifier.out_proj"],
        ["embeddings", "layer 0", "layer 1", "layer 2", "head"],
    ),
    "transformers DistilBertForSequenceClassification": (
        ["distilbert.embeddings.word_embeddings", *each("distilbert.transformer.layer.{}.ffn.lin1", 0, 1), "pre_classifier",
         "classifier"],
        ["embeddings", "layer 0", "layer 1", "head"],
    ),
    "transformers GPT2LMHeadModel": (
        ["transformer.wte", "transformer.wpe", *each("transformer.h.{}.attn.c_attn", 0, 1, 2), "transformer.ln_f.weight",
         "transformer.ln_f.bias"],
        ["embeddings", "layer 0", "layer 1", "layer 2", "final norm"],
    ),
    "transformers LlamaForSequenceClassification": (
        ["model.embed_tokens", *each("model.layers.{}.self_attn.q_proj", 0, 1), "model.norm.weight", "score"],
        ["embeddings", "layer 0", "layer 1", "final norm", "head"],
    ),
    "transformers MixtralForCausalLM": (
        ["model.embed_tokens", *each("model.layers.0.block_sparse_moe.experts.{}.w1", 0, 1), "lm_head"],
        ["embeddings", "layer 0", "head"],
    ),
    "transformers GPTNeoXForCausalLM": (
        ["gpt_neox.embed_in", *each("gpt_neox.layers.{}.mlp.dense_h_to_4h", 0, 1), "gpt_neox.final_layer_norm.weight",
         "embed_out"],
        ["embeddings", "layer 0", "layer 1", "final norm", "head"],
    ),
    "transformers T5ForConditionalGeneration": (
        ["shared", *each("encoder.block.{}.layer.0.SelfAttention.q", 0, 1), "decoder.block.0.layer.1.EncDecAttention.q",
         "decoder.final_layer_norm.weight", "lm_head"],
        ["embeddings", "encoder block 0", "encoder block 1", "decoder block 0", "final norm", "head"],
    ),
    "transformers BartForSequenceClassification": (
        ["model.encoder.embed_positions", *each("model.encoder.layers.{}.fc1", 0, 1),
         *each("model.decoder.layers.{}.fc1", 0, 1),
         "classification_head.dense", "classification_head.out_proj"],
        ["embeddings", "encoder layer 0", "encoder layer 1", "decoder layer 0", "decoder layer 1", "head"],
    ),
    "transformers CLIPModel": (
        ["text_model.embeddings.token_embedding", "text_model.encoder.layers.0.mlp.fc1",
         "vision_model.embeddings.patch_embedding", "vision_model.encoder.layers.0.mlp.fc1", "visual_projection"],
        ["text_model embeddings", "text_model layer 0", "vision_model embeddings", "vision_model layer 0",
         "visual_projection"],
    ),
    "transformers ViTForImageClassification": (
        ["vit.embeddings.cls_token", "vit.embeddings.patch_embeddings.projection",
         *each("vit.encoder.layer.{}.output.dense", 0, 1),
         "vit.layernorm.weight", "classifier"],
        ["embeddings", "layer 0", "layer 1", "final norm", "head"],
    ),
    "transformers SwinForImageClassification": (
        ["swin.embeddings.patch_embeddings.projection", *each("swin.encoder.layers.0.blocks.{}.attention.self.query", 0, 1),
         "swin.encoder.layers.0.downsample.reduction", "swin.encoder.layers.1.blocks.0.attention.self.query", "classifier"],
        ["embeddings", "layer 0 block 0", "layer 0 block 1", "layer 0", "layer 1 block 0", "head"],
    ),
    "transformers ResNetForImageClassification": (
        ["resnet.embedder.embedder.convolution", *each("resnet.encoder.stages.0.layers.{}.layer.0.convolution", 0, 1),
         "resnet.encoder.stages.1.layers.0.layer.0.convolution", "classifier.1"],
        ["embeddings", "stage 0 layer 0", "stage 0 layer 1", "stage 1 layer 0", "head"],
    ),
    "transformers WhisperForConditionalGeneration": (
        ["model.encoder.conv1", "model.encoder.conv2", "model.encoder.layers.0.fc1", "model.decoder.embed_tokens",
         "model.decoder.layers.0.fc1", "model.decoder.layer_norm.weight", "proj_out"],
        ["conv1", "conv2", "encoder layer 0", "embeddings", "decoder layer 0", "final norm", "head"],
    ),
    "torchvision resnet18": (
        ["conv1", "bn1.weight", "bn1.bias", *each("layer1.{}.conv1", 0, 1), *each("layer2.{}.conv2", 0, 1),
         "layer2.0.downsample.0", "fc"],
        ["conv1", "bn1", "layer1.0", "layer1.1", "layer2.0", "layer2.1", "head"],
    ),
    "torchvision vit_b_16": (
        ["class_token", "conv_proj", "encoder.pos_embedding", *each("encoder.layers.encoder_layer_{}.mlp.0", 0, 1, 11),
         "encoder.ln.weight", "heads.head"],
        ["embeddings", "layer 0", "layer 1", "layer 11", "final norm", "head"],
    ),
    "torchvision vgg11": (
        [*each("features.{}", 0, 3, 6), *each("classifier.{}", 0, 3, 6)],
        ["features.0", "features.3", "features.6", "head"],
    ),
    "torchvision mobilenet_v2": (
        ["features.0.0", "features.0.1.weight", *each("features.{}.conv.0.0", 1, 2), "classifier.1"],
        ["features.0", "features.1", "features.2", "head"],
    ),
    "torchvision convnext_tiny": (
        ["features.0.0", *each("features.1.{}.block.0", 0, 1), *each("features.1.{}.block.5", 0, 1), "features.2.1",
         "classifier.2"],
        ["features.0", "features.1.0", "features.1.1", "features.2", "head"],
    ),
    "torchvision densenet121": (
        ["features.conv0", *each("features.denseblock1.denselayer{}.conv1", 1, 2), "features.transition1.conv",
         "features.norm5.weight", "classifier"],
        ["conv0", "denseblock1.denselayer1", "denseblock1.denselayer2", "transition1", "norm5", "head"],
    ),
    "torchvision regnet_y_400mf": (
        ["stem.0", "stem.1.weight", *each("trunk_output.block1.block1-{}.f.a.0", 0, 1), "fc"],
        ["stem", "block1.block1-0", "block1.block1-1", "head"],
    ),
    "torchvision googlenet": (
        ["conv1.conv", "inception3a.branch1.conv", "inception3a.branch2.0.conv", "inception3b.branch1.conv",
         *each("inception4{}.branch2.1.conv", "a", "b", "c", "d"), "fc"],
        ["conv1", "inception3a", "inception3b", *each("inception4{}", "a", "b", "c", "d"), "head"],
    ),
    "timm vit_tiny_patch16_224": (
        ["cls_token", "pos_embed", "patch_embed.proj", *each("blocks.{}.attn.qkv", 0, 7), "norm.weight", "head"],
        ["embeddings", "block 0", "block 7", "final norm", "head"],
    ),
    "timm convnext_tiny": (
        ["stem.0", "stem.1.weight", "stages.0.blocks.0.mlp.fc1", "stages.1.downsample.1", "stages.1.blocks.0.mlp.fc1",
         "head.norm.weight", "head.fc"],
        ["stem", "stage 0 block 0", "stage 1", "stage 1 block 0", "head"],
    ),
    "timm efficientnet_b0": (
        ["conv_stem", "blocks.0.0.conv_dw", *each("blocks.1.{}.conv_pw", 0, 1), "conv_head", "classifier"],
        ["conv_stem", "block 0.0", "block 1.0", "block 1.1", "conv_head", "head"],
    ),
    "sentence-transformers": (
        ["0.auto_model.embeddings.word_embeddings", *each("0.auto_model.encoder.layer.{}.attention.self.query", 0, 1),
         "2.linear"],
        ["embeddings", "layer 0", "layer 1", "layer 2"],
    ),
    "a sequential network": (["0", "1.weight", "1.bias", "3", "5"], ["layer 0", "layer 1", "layer 3", "layer 5"]),
    "a sequential part": (["net.0", "net.2", "readout"], ["net.0", "net.2", "head"]),
    "plain names": (["hidden1", "hidden2", "out"], ["hidden1", "hidden2", "out"]),
    "a network in a wrapper": (["net.fc1", "net.act.weight", "net.fc2"], ["fc1", "act", "fc2"]),
    "one block": (["weight"], ["weight"]),
}  # fmt: skip


@pytest.mark.parametrize("network", NETWORKS)
def test_blocks_of_real_architectures_are_rolled_up_by_layer(network: str) -> None:
    names, expected = NETWORKS[network]
    if network == "sentence-transformers":
        expected = [*expected[:3], layers_of(names)[-1].name]
    found = layers_of(names)
    assert [layer.name for layer in found] == expected
    assert sorted(name for layer in found for name in layer.blocks) == sorted(names)
    assert [layer.kind for layer in found if layer.name == "head"] == ["head"] * expected.count("head")


@given(st.lists(st.text("ab.01_=<", min_size=1, max_size=12), min_size=1, max_size=12, unique=True))
@settings(max_examples=60, deadline=None)
def test_every_name_belongs_to_exactly_one_layer(names: list[str]) -> None:
    found = layers_of(names)
    assert sorted(name for layer in found for name in layer.blocks) == sorted(names)
    assert len(set(plain_names(names).values())) == len(names)


def test_names_lose_what_adapters_and_wrappers_add() -> None:
    before = "base_model.model.bert.encoder.layer.0.attention.self.query"
    names = [f"{before}.lora_A.default", f"{before}.lora_B.default", f"{before}.base_layer",
             "base_model.model.classifier.modules_to_save.default", "_orig_mod.fc", "module.conv"]  # fmt: skip
    after = before.removeprefix("base_model.model.")
    assert [*plain_names(names).values()] == [f"{after}.lora_A", f"{after}.lora_B", after, "classifier", "fc", "conv"]
    two = ["h.lora_A.one", "h.lora_A.two"]
    assert plain_names(two) == {name: name for name in two}  # two adapters stay apart
    assert [layer.name for layer in layers_of(names[:4])] == ["layer 0", "head"]


def test_the_block_that_makes_the_outputs_is_a_head_whatever_its_name() -> None:
    assert [layer.kind for layer in layers_of(["0", "2"], last="2")] == ["layer", "head"]
    assert [layer.kind for layer in layers_of(["0", "fc"], last="0")] == ["layer", "head"]


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ([("layer 4", "layer", False), ("layer 5", "layer", False), ("layer 6", "layer", False), ("head", "head", True)],
         "layers 4 to 6 and the new head"),
        ([("embeddings", "embeddings", False), ("layer 1", "layer", False), ("layer 3", "layer", False)],
         "the embeddings and layers 1 and 3"),
        ([("layer 0", "layer", False)], "layer 0"),
        ([("layer4.0", "layer", False), ("layer4.1", "layer", False), ("pooler", "other", False)],
         "layer4.0, layer4.1 and the pooler"),
        ([("encoder layer 1", "layer", False), ("encoder layer 2", "layer", False), ("encoder layer 3", "layer", False),
          ("decoder layer 0", "layer", False)], "encoder layers 1 to 3 and decoder layer 0"),
        ([("layer 2", "head", False)], "the last layer (layer 2)"),
    ],
)  # fmt: skip
def test_layers_are_told_in_words(layers: list[tuple[str, str, bool]], words: str) -> None:
    assert phrase(layers) == words


# shares of the change


def kernels(seed: int, parts: int, n: int, scale: float) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    features = [torch.randn(n, 3, generator=generator, dtype=torch.float64) * scale for _ in range(parts)]
    return {f"b{k}": phi @ phi.mT for k, phi in enumerate(features)}


@given(st.integers(0, 2**20), st.integers(1, 6), st.integers(2, 7), st.sampled_from([1e-160, 1e-3, 1.0, 1e4, 1e150]))
@settings(max_examples=40, deadline=None)
def test_shares_of_a_kernels_change_sum_to_one_and_add_up_by_layer(seed: int, parts: int, n: int, scale: float) -> None:
    initial, final = kernels(seed, parts, n, scale), kernels(seed + 1, parts, n, scale)
    shares = change_shares(initial, final)
    assert all(share is not None for share in shares.values()) or scale in (1e-160, 1e150)
    known = [share for share in shares.values() if share is not None]
    if not known:
        return
    assert sum(known) == pytest.approx(1, abs=1e-9)
    joined = change_shares(
        {"first": initial["b0"], "rest": sum((initial[f"b{k}"] for k in range(1, parts)), torch.zeros(n, n))},
        {"first": final["b0"], "rest": sum((final[f"b{k}"] for k in range(1, parts)), torch.zeros(n, n))},
    )
    assert joined["first"] == pytest.approx(shares["b0"], abs=1e-9)


def test_a_share_is_the_inner_product_with_the_whole_change() -> None:
    initial, final = kernels(0, 3, 5, 1.0), kernels(1, 3, 5, 1.0)
    whole = sum(final.values()) - sum(initial.values())  # type: ignore[operator]
    expected = {
        name: float((final[name] - initial[name]).flatten() @ whole.flatten() / whole.norm() ** 2) for name in initial
    }
    assert change_shares(initial, final) == pytest.approx(expected)
    assert change_shares(initial, initial) == dict.fromkeys(initial)
    against = change_shares({"a": torch.eye(2), "b": torch.eye(2)}, {"a": 4 * torch.eye(2), "b": torch.zeros(2, 2)})
    assert against == pytest.approx({"a": 1.5, "b": -0.5})


def test_the_directions_that_hold_ninety_percent_are_counted() -> None:
    assert rank_of(torch.tensor([1.0, 3.0, 1.0])) == 2
    assert rank_of(torch.tensor([3.0, 1.0])) == 1  # exactly 90 %
    assert rank_of(torch.zeros(4)) == 0
    assert rank_of(torch.ones(10)) == 9


# how layers start


def shares(first: float, last: float) -> dict[str, float | None]:
    return {"initial": first, "average": None, "final": last}


def test_new_weights_look_new_and_trained_ones_do_not() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        fresh = [nn.Linear(o, i) for o, i in ((384, 2), (64, 10), (8, 64), (200, 100))]
        normal = torch.randn(2, 384) * 0.02
        trained = [layer.weight.detach() * (1 + 0.5 * torch.rand_like(layer.weight)) for layer in fresh]
    for layer in fresh:
        assert looks_new(layer.weight.detach(), layer.bias.detach())
        assert looks_new(layer.weight.detach(), None)
    assert looks_new(normal, None)
    assert looks_new(normal * 3, torch.zeros(2))  # no trained bias is zero throughout
    assert not looks_new(normal, torch.full((2,), 1e-3))
    assert not looks_new(normal * 1.5, None)
    for weights in trained:
        assert not looks_new(weights, torch.full((len(weights),), 0.3))


@pytest.mark.parametrize(
    ("first", "last", "expected"),
    [
        (0.0, 0.1, True),
        (1e-6, 0.1, True),
        (1e-6, 1e-6, False),
        (0.1, 0.9, False),
        (1e-3, 5e-3, False),
        (0.0, 0.0, False),
    ],
)
def test_a_kernel_that_starts_from_nearly_nothing_is_recognized(first: float, last: float, expected: bool) -> None:
    assert without_kernel(shares(first, last), 10) is expected


def test_adapters_start_at_zero_and_their_first_factor_has_no_kernel() -> None:
    class Adapted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lora_A, self.lora_B = nn.Linear(5, 2, bias=False), nn.Linear(2, 3, bias=False)
            nn.init.zeros_(self.lora_B.weight)

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.lora_B(self.lora_A(x))
            return found

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, x = Adapted().double(), torch.randn(6, 5, dtype=torch.float64)
    feats = at.tangent_features(model, x)
    parts = feats.kernel(outputs="trace", by_block=True)
    assert float(parts["lora_A"].trace()) == 0
    numbers = {"lora_A": {"trace_share": shares(0.0, 0.4)}, "lora_B": {"trace_share": shares(1.0, 0.6)}}
    found = {
        name: start_of(feats.blocks[name], dict(model.named_parameters())[f"{name}.weight"].detach(), numbers[name], 2)
        for name in feats.blocks
    }
    assert found == {"lora_A": "no kernel", "lora_B": "zero"}


@pytest.mark.parametrize(
    ("kind", "own", "others", "expected"),
    [
        ("head", ["new"], [None, None], True),
        ("head", ["new"], [], True),  # beside adapters alone
        ("head", ["new", None], [None], False),
        ("layer", ["new"], [None, None], False),
        ("head", ["new"], ["new", "new", None], False),  # all of the network is new
        ("head", ["zero"], [None], True),
    ],
)
def test_a_head_is_new_beside_layers_that_were_trained(
    kind: str, own: Sequence[str | None], others: Sequence[str | None], expected: bool
) -> None:
    assert new_head(kind, own, others) is expected
    assert from_scratch(["new", "new", None])
    assert not from_scratch([])
