"""Replicas: adapters of many runs in one forward and backward pass of the frozen model.

A small model leaves a device idle: a training step takes as long as its kernels take to launch.
Here every target layer has the adapters of all runs, and a batch has the texts of all runs. Losses
are summed over the replicas, so that the gradient of each is that of its own loss.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

BETAS, EPSILON, LARGEST_NORM = (0.9, 0.999), 1e-8, 1.0
#: Kernels that can be captured with certainty: not cuDNN's.
ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@dataclass(frozen=True)
class Start:
    """Adapters before training; B is zero.

    Parameters
    ----------
    a : mapping
        A by the name of the layer, shape (rank, in features). Layers without one are not adapted.
    scaling : mapping
        Factor of B A by the name of the layer.
    trainable : bool
        Whether A is trained.
    spent : float
        Steps that choosing A was worth.
    """

    a: Mapping[str, torch.Tensor]
    scaling: Mapping[str, float]
    trainable: bool
    spent: float


class ReplicaLinear(nn.Module):
    """A frozen linear layer with adapters of all replicas, in float32 as those of PEFT.

    Parameters
    ----------
    base : torch.nn.Linear
    a, b : torch.Tensor
        Shapes (replicas, rank, in features) and (replicas, out features, rank).
    scaling : torch.Tensor
        Shape (replicas, 1, 1).
    """

    def __init__(
        self, base: nn.Module, a: torch.Tensor, b: torch.Tensor, scaling: torch.Tensor
    ) -> None:
        super().__init__()
        self.base, self.a, self.b, self.scaling = base, a, b, scaling

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return W x + scaling B A x; the rows of a replica are consecutive."""
        result: torch.Tensor = self.base(x)
        rows = x.reshape(len(self.a), -1, x.shape[-1]).to(self.a.dtype)
        update = torch.bmm(torch.bmm(rows, self.a.mT) * self.scaling, self.b.mT)
        return (result + update.view(result.shape)).to(result.dtype)


class Replicas:
    """A decoder of Llama's kind with adapters of all replicas.

    Parameters
    ----------
    body : torch.nn.Module
        The decoder without output embedding, frozen; its target layers are replaced.
    output : torch.Tensor
        Output embedding, shape (vocabulary, width).
    starts : sequence of Start
        One for each replica.
    """

    def __init__(self, body: nn.Module, output: torch.Tensor, starts: Sequence[Start]) -> None:
        self.body, self._output, self._starts = body, output, starts
        count, device = len(starts), output.device
        layers = {
            name: layer
            for name, layer in body.named_modules()
            if any(name in start.a for start in starts)
        }
        ranks = {name: max(len(s.a[name]) for s in starts if name in s.a) for name in layers}
        sizes = [layer.in_features * ranks[name] for name, layer in layers.items()]
        #: Numbers of A in a replica; those of B follow.
        self.of_a = sum(sizes)
        sizes += [layer.out_features * ranks[name] for name, layer in layers.items()]
        self.parameters = torch.zeros(count, sum(sizes), device=device)
        self.gradients = torch.zeros_like(self.parameters)
        values, slopes = self.parameters.split(sizes, 1), self.gradients.split(sizes, 1)
        self._a: dict[str, torch.Tensor] = {}
        self._leaves, self._slopes = [], []
        for number, (name, layer) in enumerate(layers.items()):
            a, b = (
                values[place].view(shape).detach().requires_grad_()
                for place, shape in (
                    (number, (count, ranks[name], layer.in_features)),
                    (number + len(layers), (count, layer.out_features, ranks[name])),
                )
            )
            self._leaves += [a, b]
            self._slopes += [slopes[number].view_as(a), slopes[number + len(layers)].view_as(b)]
            scaling = torch.tensor([s.scaling.get(name, 0.0) for s in starts], device=device)
            body.set_submodule(name, ReplicaLinear(layer, a, b, scaling[:, None, None]))
            self._a[name] = a
        self.trainable = torch.tensor([s.trainable for s in starts], device=device)[:, None]
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Put all adapters back to their start; ranks below a layer's largest end in zeros."""
        self.parameters.zero_()
        for name, stacked in self._a.items():
            for a, start in zip(stacked, self._starts, strict=True):
                if name in start.a:
                    a[: len(start.a[name])] = start.a[name]

    def losses(self, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return negative log-likelihoods, zero where none is wanted.

        Padding is on the right and needs no mask: attention is causal.

        Parameters
        ----------
        hidden : torch.Tensor
            What enters the blocks, shape (groups, texts, positions, width). A group's texts are
            those of replicas in sequence, as many for each group.
        labels : torch.Tensor
            Shape (groups, texts, positions), -100 where none is wanted.

        Returns
        -------
        torch.Tensor
            Shape (replicas, texts, positions - 1).
        """
        count = len(self.parameters)
        x = _repeated(hidden, count).flatten(0, 1)
        angles = torch.arange(x.shape[1], device=x.device)[:, None] * self.body.rotary_emb.inv_freq
        angles = torch.cat((angles, angles), 1)[None]
        turns = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        with sdpa_kernel(ATTENTION):
            for block in self.body.layers:
                x = block(x, attention_mask=None, position_embeddings=turns)
        x = self.body.norm(x)[:, :-1]
        wanted = _repeated(labels[..., 1:], count)
        logits = functional.linear(x, self._output).float()
        return functional.cross_entropy(
            logits.flatten(0, 1), wanted.flatten(), reduction="none", ignore_index=-100
        ).view(wanted.shape)

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of a loss."""
        torch._foreach_add_(self._slopes, torch.autograd.grad(loss, self._leaves))


def _repeated(groups: torch.Tensor, count: int) -> torch.Tensor:
    """Return the row of every replica: (groups, ...) becomes (count, ...)."""
    each = count // len(groups)
    return groups[:, None].expand(-1, each, *groups.shape[1:]).flatten(0, 1)


@dataclass(frozen=True)
class Texts:
    """Texts, padded on the right.

    Parameters
    ----------
    tokens : torch.Tensor
        Rows of the embedding, shape (texts, positions).
    labels : torch.Tensor
        Rows of the output embedding, shape (texts, positions), -100 where none is wanted.
    lengths : torch.Tensor
        Shape (texts,), on the CPU.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    lengths: torch.Tensor


class ReplicaTraining:
    """Training of all replicas: AdamW, a linear schedule with warm-up, a clipped norm, for each.

    Nothing in a step asks the device for a number, and all that changes is in tensors on the
    device, so that a step can be captured.

    Parameters
    ----------
    replicas : Replicas
    embedding : torch.Tensor
        Shape (tokens, width).
    texts : Texts
        To train on.
    order : torch.Tensor
        Places of the texts of each step, shape (steps, groups, batch).
    rates : sequence of float
        Learning rate of each replica.
    chunk : callable
        How many texts of a batch are computed at once, from the number of positions.
    """

    def __init__(
        self,
        replicas: Replicas,
        embedding: torch.Tensor,
        texts: Texts,
        order: torch.Tensor,
        rates: Sequence[float],
        chunk: Callable[[int], int],
    ) -> None:
        self.replicas, self.texts = replicas, texts
        self._embedding, self._chunk = embedding, chunk
        device = replicas.parameters.device
        self._rates, self._order = rates, order.to(device)
        #: Number of the next step, on the device.
        self.number = torch.zeros(1, dtype=torch.long, device=device)
        #: Mean loss of each step and replica.
        self.curve = torch.zeros(len(order), len(rates), device=device)
        self._table = torch.zeros(len(order), len(rates) + 1, device=device)
        self._first, self._second = (torch.zeros_like(replicas.parameters) for _ in range(2))

    def begin(self, steps: int, spent: Sequence[float], warmup: float) -> None:
        """Put everything back to the start of a training of so many steps, those of A included."""
        self.replicas.reset()
        for state in (self.number, self.curve, self._first, self._second):
            state.zero_()
        self._table[:steps] = schedule(steps, self._rates, spent, warmup).to(self._table)

    def step(self, length: int) -> None:
        """Train on the next batch of every group, padded to a length."""
        places = self._order.index_select(0, self.number)[0]
        labels = self.texts.labels[places, :length]
        tokens = self.texts.tokens[places, :length]
        share = 1 / (labels[..., 1:] != -100).sum((1, 2)).clamp_min(1)
        share = _repeated(share, len(self.replicas.parameters))
        self.replicas.gradients.zero_()
        size, total = self._chunk(length), torch.zeros_like(share)
        for start in range(0, places.shape[1], size):
            part = slice(start, start + size)
            hidden = functional.embedding(tokens[:, part], self._embedding)
            losses = share * self.replicas.losses(hidden, labels[:, part]).sum((1, 2))
            self.replicas.backward(losses.sum())
            total = total + losses.detach()
        self.curve.index_copy_(0, self.number, total[None])
        self._update()

    @torch.no_grad()
    def _update(self) -> None:
        gradients, (first, second) = self.replicas.gradients, BETAS
        gradients[:, : self.replicas.of_a].mul_(self.replicas.trainable)
        norms = torch.linalg.vector_norm(gradients, dim=1, keepdim=True)
        gradients.mul_((LARGEST_NORM / (norms + 1e-6)).clamp_max(1))
        row = self._table.index_select(0, self.number)[0]
        self._first.lerp_(gradients, 1 - first)
        self._second.mul_(second).addcmul_(gradients, gradients, value=1 - second)
        scale = (self._second.sqrt() / row[-1]).add_(EPSILON)
        self.replicas.parameters.addcdiv_(self._first * row[:-1, None], scale, value=-1)
        self.number.add_(1)

    @torch.no_grad()
    def nats(self, texts: Texts, size: int) -> torch.Tensor:
        """Return the negative log-likelihood for each token, shape (replicas,), in float64."""
        total, count = torch.zeros(len(self._rates), dtype=torch.float64), 0
        for places in texts.lengths.argsort().split(size):
            length = int(texts.lengths[places].max())
            places = places.to(texts.tokens.device)
            labels = texts.labels[places, :length][None]
            hidden = functional.embedding(texts.tokens[places, :length], self._embedding)[None]
            total += self.replicas.losses(hidden, labels).double().sum((1, 2)).cpu()
            count += int((labels[..., 1:] != -100).sum())
        return total / count


def schedule(
    steps: int, rates: Sequence[float], spent: Sequence[float], warmup: float
) -> torch.Tensor:
    """Return AdamW's rate for each step and replica, and in the last column its second correction.

    As `benchmarks.evidence.training`: a linear rise over a share of the steps, and a linear fall to
    zero. Steps that choosing A was worth are taken off; a replica that has ended has rate zero.

    Returns
    -------
    torch.Tensor
        Shape (steps, replicas + 1), float64.
    """
    number = torch.arange(steps, dtype=torch.float64)[:, None]
    left = steps - torch.tensor(spent, dtype=torch.float64).round()
    if left.min() < 1:
        raise ValueError(f"expected A to cost less than {steps} steps, got {max(spent):g}")
    rise = (warmup * left).round()
    falling = ((left - number) / (left - rise).clamp_min(1)).clamp_min(0)
    shares = torch.where(number < rise, number / rise.clamp_min(1), falling)
    first, second = (1 - torch.tensor(beta, dtype=torch.float64) ** (number + 1) for beta in BETAS)
    wanted = torch.tensor(rates, dtype=torch.float64) * shares / first
    return torch.cat([wanted, second.sqrt()], 1)
