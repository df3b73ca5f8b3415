"""Models of other libraries at tiny widths; each is skipped if its library is absent."""

from typing import Any

import torch
from torch import nn

from cases import Case, normal, with_statistics
from real_cases import Made, indices


def lively(model: nn.Module) -> nn.Module:
    """Give the model large weights, so that every block matters."""
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4)
    return model.double()


def timm_resnet() -> Made:
    import timm

    model = timm.models.ResNet(
        timm.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=2, channels=(2, 2, 3, 3), stem_width=2,
        stem_type="deep",
    )  # fmt: skip
    return with_statistics(lively(model)), normal(2, 3, 16, 16)


def timm_vit(**keywords: Any) -> Made:
    import timm

    model = timm.models.VisionTransformer(
        img_size=16, patch_size=8, embed_dim=4, depth=2, num_heads=2, mlp_ratio=1.5, num_classes=3, **keywords
    )
    return lively(model), normal(3, 3, 16, 16)


def gpt2() -> Made:
    from transformers import GPT2Config, GPT2ForSequenceClassification

    model = GPT2ForSequenceClassification(
        GPT2Config(
            vocab_size=11,
            n_positions=6,
            n_embd=4,
            n_layer=2,
            n_head=2,
            num_labels=2,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    ids, mask = indices(10, 3, 5) + 1, torch.ones(3, 5, dtype=torch.long)
    ids[1, 3:], mask[1, 3:] = 0, 0
    return lively(model), {"input_ids": ids, "attention_mask": mask}


def bert() -> Made:
    from transformers import BertConfig, BertForSequenceClassification

    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=11, hidden_size=4, num_hidden_layers=2, num_attention_heads=2, intermediate_size=6,
            max_position_embeddings=6, num_labels=2, pad_token_id=0,
        )
    )  # fmt: skip
    ids, mask = indices(10, 3, 5) + 1, torch.ones(3, 5, dtype=torch.long)
    ids[1, 3:], mask[1, 3:] = 0, 0
    return lively(model), {"input_ids": ids, "attention_mask": mask}


def logits(out: Any) -> torch.Tensor:
    return out.logits


CASES = (
    Case("timm ResNet", timm_resnet, may_be_whole=(), requires="timm"),
    Case("timm ViT", timm_vit, may_be_whole=("cls_token", "pos_embed"), requires="timm"),
    Case("timm ViT, pooled", lambda: timm_vit(class_token=False, global_pool="avg"), may_be_whole=("pos_embed",),
        requires="timm"),
    Case("transformers GPT-2", gpt2, may_be_whole=("*wpe.weight",), output_fn=logits, requires="transformers"),
    Case("transformers BERT", bert, may_be_whole=("*position_embeddings*", "*token_type*"), output_fn=logits,
        requires="transformers"),
)  # fmt: skip
