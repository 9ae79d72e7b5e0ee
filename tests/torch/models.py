"""Small random models of every kind, and the exact optimum for what their layers see."""

import torch
from torch import nn
from torch.nn import functional as F


class Attention(nn.Module):
    """Self-attention as one writes it by hand, with calls by keyword."""

    def __init__(self, width=12, heads=2):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)

    def forward(self, x, attention_mask=None):
        def split(y):
            return y.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        q, k, v = split(self.q(input=x)), split(self.k(input=x)), split(self.v(input=x))
        mask = None if attention_mask is None else attention_mask[:, None, None, :].bool()
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(input=mixed.transpose(1, 2).flatten(2))


class Transformer(nn.Module):
    """Two blocks over token numbers; a padding mask is honoured exactly."""

    def __init__(self, width=12, blocks=2, vocabulary=20):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.attention = nn.ModuleList(Attention(width) for _ in range(blocks))
        self.up = nn.ModuleList(nn.Linear(width, 2 * width) for _ in range(blocks))
        self.down = nn.ModuleList(nn.Linear(2 * width, width) for _ in range(blocks))

    def forward(self, input_ids, attention_mask=None):
        x = self.embed(input_ids)
        for attention, up, down in zip(self.attention, self.up, self.down, strict=True):
            x = x + attention(x=x, attention_mask=attention_mask)
            x = x + down(F.gelu(up(x)))
        return x


def mlp(*sizes):
    """Linear layers with ReLU between them."""
    layers = []
    for before, after in zip(sizes, sizes[1:], strict=False):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def decaying(rows, features, seed=0):
    """Rows whose directions have clearly different energies."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, features, generator=generator)
    turn = torch.linalg.qr(torch.randn(features, features, generator=generator)).Q
    return (x / torch.arange(1, features + 1)) @ turn


def excess(projector, rows):
    """Reconstruction error over the float64 optimum of ``rows``, minus one."""
    rows = rows.detach().double().reshape(-1, rows.shape[-1])
    p = projector.components.double()
    energy = rows.square().sum()
    left = energy - (rows @ p.T).square().sum()
    best = energy - torch.linalg.svdvals(rows)[: projector.rank].square().sum()
    return float((left - best) / best)


def angle(first, second):
    """Largest principal angle between the spans of two projectors."""
    a, b = first.components.double(), second.components.double()
    outside = b - b @ a.T @ a
    return float(torch.linalg.svdvals(outside).max().clamp(max=1).asin())
