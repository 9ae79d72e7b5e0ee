"""Activation streams of the learner benchmarks: from MiniLM, and harder ones derived from them."""

from collections.abc import Iterator

import numpy as np
import torch
from transformers import AutoModel, AutoTokenizer

from benchmarks import assets

Stream = list[np.ndarray]


def minilm_inputs(
    names: list[str], batches: int, size: int = 64
) -> Iterator[dict[str, torch.Tensor]]:
    """Yield the inputs of MiniLM's named layers on movie reviews, padding left out, by batch."""
    folder = assets.minilm()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder).eval()
    reviews = [text for text, _ in assets.movie_reviews()]
    seen: dict[str, torch.Tensor] = {}
    for name in names:
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: seen.__setitem__(name, args[0])
        )
    for start in range(0, batches * size, size):
        batch = tokenizer(
            reviews[start : start + size],
            padding=True,
            truncation=True,
            max_length=128,
            return_tensors="pt",
        )
        with torch.no_grad():
            model(**batch)
        mask = batch["attention_mask"].bool()
        yield {name: seen[name][mask] for name in names}


UP, DOWN = "encoder.layer.3.intermediate.dense", "encoder.layer.3.output.dense"


def streams(batches: int = 40) -> dict[str, Stream]:
    """Return the named streams: two real ones, and what makes one pass hard."""
    inputs = list(minilm_inputs([UP, DOWN], batches))
    up = [seen[UP].numpy() for seen in inputs]
    down = [seen[DOWN].numpy() for seen in inputs]
    rows, borders = np.concatenate(up), np.cumsum([len(part) for part in up])[:-1]
    lead = np.linalg.eigh(rows.T.astype(float) @ rows)[1][:, -1]
    outlier = rows.copy()
    outlier[:, 7] *= 1000
    return {
        "up": up,
        "down": down,
        "up in batches of 300": np.array_split(rows, len(rows) // 300),
        "sorted by norm": np.split(rows[np.argsort(np.linalg.norm(rows, axis=1))], borders),
        "sorted along the leading direction": np.split(rows[np.argsort(rows @ lead)], borders),
        "outlier coordinate x 1000": np.split(outlier, borders),
        **synthetic(rows.shape[1], batches, len(rows) // batches),
    }


def synthetic(features: int, batches: int, rows: int) -> dict[str, Stream]:
    """Return a flat spectrum, two that switch subspace, and one of exactly low rank."""
    rng = np.random.default_rng(1)
    basis = np.linalg.qr(rng.standard_normal((features, features)))[0].astype("float32")

    def block(directions: slice, decay: float, noise: float = 0.0) -> np.ndarray:
        axes = basis[directions]
        spectrum = np.arange(1, len(axes) + 1, dtype="float32") ** -decay
        x = (rng.standard_normal((rows, len(axes)), dtype="float32") * spectrum) @ axes
        return x + noise * rng.standard_normal((rows, features), dtype="float32")

    first, second = slice(0, 30), slice(30, 60)
    half = batches // 2
    return {
        "flat spectrum": [block(slice(None), 0.25) for _ in range(batches)],
        "switches at two thirds": [block(first, 0.5, 0.01) for _ in range(2 * batches // 3)]
        + [block(second, 0.5, 0.01) for _ in range(half)],
        "new subspace in the last batch": [block(first, 0.5, 0.01) for _ in range(batches - 1)]
        + [4 * block(second, 0.5, 0.01)],
        "rank 24 exactly": [block(slice(0, 24), 0.5) for _ in range(batches)],
    }
