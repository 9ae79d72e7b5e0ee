"""Training of a cell of the table, with learning rate and epochs chosen on validation data."""

import copy
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field

import torch
from torch import nn

from benchmarks.vtab.methods import METHODS, RANK, Projections
from benchmarks.vtab.models import Backbone, after, before
from benchmarks.vtab.sets import Split, VtabSet
from ipa_timm import default_targets, fit_projectors
from ipa_torch.extension import classifier_modules

State = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Settings:
    """The protocol, common to all methods."""

    epochs: int = 6
    batch_size: int = 64
    rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3, 1e-2)
    seeds: tuple[int, ...] = (0, 1, 2)
    warm_up: float = 0.1


@dataclass(frozen=True)
class Run:
    """Settings of a training run, and its best epoch on validation data."""

    seed: int
    rate: float
    epoch: int
    validation: float
    loss: float
    seconds: float
    state: State = field(repr=False, compare=False)

    @property
    def merit(self) -> tuple[float, float]:
        """Accuracy; the loss decides between equal ones, of which 200 images give many."""
        return self.validation, -self.loss


class Cell:
    """A set, seen by a backbone, with what stays frozen computed once."""

    def __init__(
        self, backbone: Backbone, model: nn.Module, data: VtabSet, settings: Settings
    ) -> None:
        self.backbone, self.model, self.data, self.settings = backbone, model, data, settings
        self.train = self._seen(data.train)
        self.validation = self._seen(data.validation)
        self.projections = self._learned()

    def result(self, method: str) -> dict[str, object]:
        """Train at every rate with the first seed, with the other seeds at the best; test once."""
        first, *others = self.settings.seeds
        swept = [self._run(method, first, rate) for rate in self.settings.rates]
        best = max(swept, key=lambda run: run.merit)
        runs = [best, *(self._run(method, seed, best.rate) for seed in others)]
        models = [self._model(method, run.seed) for run in runs]
        for model, run in zip(models, runs, strict=True):
            model.load_state_dict(run.state, strict=False)
        tests = self._test(models)
        trainable = sum(p.numel() for p in models[0].parameters() if p.requires_grad)
        return {
            "set": self.data.name,
            "method": method,
            "rank": RANK,
            "trainable": trainable,
            "layers": len(self.projections),
            "test_images": len(self.data.test),
            "settings": asdict(self.settings),
            "sweep": [_as_dict(run) for run in swept],
            "runs": [_as_dict(run) | {"test": test} for run, test in zip(runs, tests, strict=True)],
        }

    def _model(self, method: str, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        model = copy.deepcopy(self.model)
        for module in classifier_modules(model)[0].modules():
            if isinstance(module, nn.Linear):
                module.reset_parameters()
        METHODS[method](model, self.projections)
        return model.eval()  # no dropout anywhere, and batch norms as they are

    def _run(self, method: str, seed: int, rate: float) -> Run:
        began = time.perf_counter()
        model = self._model(method, seed)
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
        x, labels = self.train
        size = self.settings.batch_size
        steps = self.settings.epochs * -(-len(labels) // size)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, rate, steps, pct_start=self.settings.warm_up, cycle_momentum=False
        )
        order = torch.Generator().manual_seed(seed)
        best: Run | None = None
        for epoch in range(self.settings.epochs):
            for chosen in torch.randperm(len(labels), generator=order).split(size):
                optimizer.zero_grad()
                outputs = after(model, x[chosen], self.backbone.first)
                nn.functional.cross_entropy(outputs, labels[chosen]).backward()
                optimizer.step()
                schedule.step()
            accuracy, loss = self._validated(model)
            seconds = time.perf_counter() - began
            run = Run(seed, rate, epoch + 1, accuracy, loss, seconds, {})
            if best is None or run.merit > best.merit:
                best = Run(seed, rate, epoch + 1, accuracy, loss, seconds, _trained(model))
        assert best is not None
        return best

    @torch.no_grad()
    def _validated(self, model: nn.Module) -> tuple[float, float]:
        x, labels = self.validation
        outputs = after(model, x, self.backbone.first)
        loss = nn.functional.cross_entropy(outputs, labels)
        return float((outputs.argmax(1) == labels).double().mean()), float(loss)

    @torch.no_grad()
    def _test(self, models: Iterable[nn.Module]) -> list[float]:
        models = list(models)
        right = [0] * len(models)
        for images, labels in self.data.test.batches(100, self.backbone.pixels):
            x = before(self.model, images, self.backbone.first)
            for place, model in enumerate(models):
                chosen = after(model, x, self.backbone.first).argmax(1)
                right[place] += int((chosen == labels).sum())
        return [count / len(self.data.test) for count in right]

    def _seen(self, split: Split) -> tuple[torch.Tensor, torch.Tensor]:
        parts = [
            before(self.model, images, self.backbone.first)
            for images, _ in split.batches(100, self.backbone.pixels)
        ]
        return torch.cat(parts), split.labels

    def _learned(self) -> Projections:
        """Learn P for the blocks that get adapters, from the 800 training images."""
        names = [
            name
            for name in default_targets(self.model)
            if not name.startswith("blocks.") or int(name.split(".")[1]) >= self.backbone.first
        ]
        loader = self.train[0].split(self.settings.batch_size)
        return fit_projectors(
            self.model,
            loader,
            RANK,
            targets=names,
            forward=lambda model, x: after(model, x, self.backbone.first),
            progress=False,
        )


def _trained(model: nn.Module) -> State:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def _as_dict(run: Run) -> dict[str, object]:
    return {key: value for key, value in vars(run).items() if key != "state"}
