"""Small random models of every kind, and the exact optimum for what their layers see."""

import torch
from torch import nn
from torch.nn import functional as F


class Attention(nn.Module):
    """Self-attention as one writes it by hand, with calls by keyword."""

    def __init__(self, width=12, heads=2, keywords=True):
        super().__init__()
        self.heads, self.keywords = heads, keywords
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)

    def forward(self, x, attention_mask=None):
        def split(y):
            return y.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        if self.keywords:
            q, k, v = self.q(input=x), self.k(input=x), self.v(input=x)
        else:
            q, k, v = self.q(x), self.k(x), self.v(x)
        q, k, v = split(q), split(k), split(v)
        mask = None if attention_mask is None else attention_mask[:, None, None, :].bool()
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(input=mixed.transpose(1, 2).flatten(2))


class Transformer(nn.Module):
    """Two blocks over token numbers; a padding mask is honored exactly."""

    def __init__(self, width=12, blocks=2, vocabulary=20, keywords=True):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.attention = nn.ModuleList(Attention(width, keywords=keywords) for _ in range(blocks))
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


def generator(seed):
    """Return a generator of random numbers on the device of the tensors that torch makes."""
    return torch.Generator(torch.get_default_device()).manual_seed(seed)


def decaying(rows, features, seed=0):
    """Rows whose directions have clearly different energies."""
    source = generator(seed)
    x = torch.randn(rows, features, generator=source)
    turn = torch.linalg.qr(torch.randn(features, features, generator=source)).Q
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


class Convolutions(nn.Module):
    """Grouped, strided, dilated and padded convolutions in one and two dimensions."""

    def __init__(self):
        super().__init__()
        self.strided = nn.Conv2d(3, 8, (3, 2), stride=(2, 1), padding=(1, 0))
        self.grouped = nn.Conv2d(8, 12, 3, groups=4, dilation=(1, 2), padding="same")
        self.reflected = nn.Conv2d(12, 6, 3, padding=(2, 1), padding_mode="reflect")
        self.line = nn.Conv1d(6, 4, 3, stride=2, padding=1, padding_mode="circular", groups=2)

    def forward(self, x):
        x = F.relu(self.strided(x))
        x = F.relu(self.grouped(x))
        x = F.relu(self.reflected(x))
        return self.line(x.flatten(2))


class LSTMTagger(nn.Module):
    """An LSTM with a linear head."""

    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(6, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.lstm(x)[0])


class Tied(nn.Module):
    """An output layer that has the embedding's weight."""

    def __init__(self):
        super().__init__()
        self.embed, self.hidden, self.head = nn.Embedding(10, 6), nn.Linear(6, 6), nn.Linear(6, 10)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(torch.tanh(self.hidden(self.embed(ids))))


class Bypassed(nn.Module):
    """A layer whose weight is used without calling the layer."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x):
        return self.out(F.linear(x, self.qkv.weight))


class Experts(nn.Module):
    """Two experts; rows go to the second one only where their first entry is large."""

    def __init__(self):
        super().__init__()
        self.gate, self.experts = nn.Linear(6, 6), nn.ModuleList(nn.Linear(6, 6) for _ in range(2))

    def forward(self, x):
        x = self.gate(x)
        y = self.experts[0](x)
        large = x[x[:, 0] > 0.5]
        return y.sum() + (self.experts[1](large).sum() if large.shape[0] else 0)


class Int8Linear(nn.Module):
    """A quantized layer as packages make them: no nn.Linear, no floating weight."""

    def __init__(self, layer):
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        steps = layer.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("weight", (layer.weight.detach() / steps).round().to(torch.int8))
        self.register_buffer("steps", steps)
        self.bias = nn.Parameter(layer.bias.detach())

    def forward(self, x):
        return F.linear(x, self.weight * self.steps, self.bias)


class WithIdleLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.idle = nn.Linear(6, 2), nn.Linear(6, 2)

    def forward(self, x):
        return self.used(x)
