"""A classifier made of words: images are compared with "a photo of a {label}"."""

from pathlib import Path

import torch
from torch import nn

from benchmarks.vtab.sets import LayoutError, VtabSet


class ZeroShotHead(nn.Module):
    """SigLIP's logits: a scaled cosine between an image and each label's text, plus a bias."""

    def __init__(self, texts: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor) -> None:
        super().__init__()
        # Buffers: what is trained are the adapters alone.
        self.register_buffer("texts", nn.functional.normalize(texts, dim=-1))
        self.register_buffer("scale", scale.detach().clone())
        self.register_buffer("bias", bias.detach().clone())

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Return logits (batch, labels) of image features (batch, width)."""
        cosines = nn.functional.normalize(features, dim=-1) @ self.texts.T
        return cosines * self.scale.exp() + self.bias


@torch.no_grad()
def zero_shot_head(checkpoint: Path, data: VtabSet) -> ZeroShotHead:
    """Return a head for a set, by the text encoder of a SigLIP checkpoint of transformers.

    The labels' names are the lines of ``classes.txt`` in the set's folder.
    """
    from transformers import AutoModel, AutoTokenizer

    path = data.folder / "classes.txt"
    names = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    if len(names) != data.classes:
        raise LayoutError(
            f"{path}: expected the names of {data.classes} classes, a line each, got {len(names)}"
        )
    model = AutoModel.from_pretrained(checkpoint).eval()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    tokens = tokenizer(
        [f"a photo of a {name}" for name in names],
        padding="max_length",  # as SigLIP was trained
        max_length=model.config.text_config.max_position_embeddings,
        truncation=True,
        return_tensors="pt",
    )
    texts = model.text_model(input_ids=tokens["input_ids"]).pooler_output
    return ZeroShotHead(texts, model.logit_scale, model.logit_bias)
