"""Try models from packages of model code: python -m benchmarks.foreign_walk [NAME ...].

Each is fitted, adapted, trained for a step, merged, restored, saved and loaded, beside rows that
plain hooks capture. Writes ``results/foreign_walk.md``. `make test-foreign` installs the packages
into a folder of their own, runs this, and fails if a result is wrong without an error of the
library.
"""

import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import nn

from benchmarks import record
from benchmarks.foreign_models import MODELS
from ipa_core import ExactCovariance
from ipa_core.errors import IPAError
from ipa_torch import (
    LayerProjectors,
    adapter_state_dict,
    attach,
    detach,
    fit_projectors,
    load_adapter_state_dict,
    merge,
    unmerge,
)
from ipa_torch.extension import adapter_layers, is_linear

RANK = 2
#: Largest relative difference of outputs that are said to be equal, and of captured energy.
TOLERANCE, EXCESS = 1e-4, 1e-4


class WrongResultError(Exception):
    """A result is wrong, and nothing was said."""


@dataclass
class Outcome:
    """Layers with an adapter, layers without, and what was refused."""

    layers: int = 0
    missing: dict[str, str] = field(default_factory=dict)
    broken: str = ""
    refused: str = ""
    unmerged: str = ""
    wrong: str = ""

    @property
    def verdict(self) -> str:
        """Short form of the outcome."""
        if self.broken:
            return f"not tried, fails without adapters: {self.broken}"
        if self.wrong:
            return f"WRONG: {self.wrong}"
        if self.refused:
            return f"refused: {self.refused}"
        return f"works, not merged: {self.unmerged}" if self.unmerged else "works"


def check(make: Callable[[], nn.Module], inputs: Callable[[], tuple[Any, ...]]) -> Outcome:
    """Return what becomes of a model."""
    outcome = Outcome()
    try:
        model, twin, batch = _seeded(make).eval(), _seeded(make).eval(), _seeded(inputs)
        # The first pass of some models initializes buffers.
        trained = [_trained_layers(net, batch) for net in (model, twin)][0]
    except Exception as error:
        outcome.broken = f"{type(error).__name__}: {_short(error)}"
        return outcome
    try:
        _walk(outcome, model, twin, batch, trained)
    except IPAError as error:
        outcome.refused = _short(error)
    except WrongResultError as error:
        outcome.wrong = str(error)
    except Exception as error:
        outcome.wrong = f"raw {type(error).__name__}: {_short(error)}"
    return outcome


def _trained_layers(model: nn.Module, batch: tuple[Any, ...]) -> set[str]:
    """Return the layers whose weights have a gradient, without any adapter."""
    _loss(model, batch).backward()
    names = {name.rpartition(".")[0] for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return names


def _loss(model: nn.Module, batch: tuple[Any, ...]) -> torch.Tensor:
    squares = [t.square().mean() for t in _tensors(_seeded(lambda: model(*batch)))]
    return torch.stack([square for square in squares if square.requires_grad]).sum()


def _walk(
    outcome: Outcome,
    model: nn.Module,
    twin: nn.Module,
    batch: tuple[Any, ...],
    trained: set[str],
) -> None:
    base = _outputs(model, batch)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    run = lambda net, _: _seeded(lambda: net(*batch))  # noqa: E731
    parts = [module for module in model.modules() if module is not model]
    convolutions = any(_is_convolution("", module) for module in parts)
    linear = any(map(is_linear, parts)) or not convolutions
    projectors = fit_projectors(
        model, [batch], RANK, learner=ExactCovariance, forward=run, progress=False,
        targets="all-linear" if linear else _is_convolution, on_missing="ignore",
    )  # fmt: skip
    outcome.layers, outcome.missing = len(projectors), dict(projectors.missing)
    _check_rows(model, batch, projectors)
    attach(model, projectors)
    _equal("outputs with B = 0", _outputs(model, batch), base)
    _step(model, batch, trained)
    adapted = _outputs(model, batch)
    if torch.equal(
        torch.cat([t.flatten() for t in adapted]), torch.cat([t.flatten() for t in base])
    ):
        raise WrongResultError("B has no effect")
    load_adapter_state_dict(twin, adapter_state_dict(model))
    _equal("outputs of the loaded adapter", _outputs(twin, batch), adapted)
    try:
        merge(model)
        _equal("merged outputs", _outputs(model, batch), adapted)
        unmerge(model)
    except IPAError as error:
        outcome.unmerged = _short(error)
    _equal("outputs after merging and unmerging", _outputs(model, batch), adapted)
    detach(model)
    after = model.state_dict()
    if before.keys() != after.keys() or any(
        not torch.equal(v, after[k]) for k, v in before.items()
    ):
        raise WrongResultError("the state after detach is not that before attach")
    _equal("outputs after detach", _outputs(model, batch), base)


def _is_convolution(name: str, module: nn.Module) -> bool:
    return isinstance(module, (nn.Conv1d, nn.Conv2d))


def _rows(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Return the rows of a layer's input, by torch's own ``unfold`` for convolutions."""
    if not _is_convolution("", module):
        return x.reshape(-1, x.shape[-1])
    assert isinstance(module, (nn.Conv1d, nn.Conv2d))
    assert module.padding_mode == "zeros" and isinstance(module.padding, tuple)
    pads = [pad for pads in module.padding[::-1] for pad in (pads, pads)]
    x = nn.functional.pad(x, pads)
    if isinstance(module, nn.Conv1d):
        x = x[:, :, None]
    kernel, dilation, stride = (
        (1,) * (2 - len(sizes)) + sizes
        for sizes in (module.kernel_size, module.dilation, module.stride)
    )
    patches = nn.functional.unfold(x, kernel, dilation=dilation, stride=stride)
    parts = patches.unflatten(1, (module.groups, -1))
    return parts.movedim(-1, 1).flatten(0, 2)


def _check_rows(model: nn.Module, batch: tuple[Any, ...], projectors: LayerProjectors) -> None:
    """Compare with the second moment of the rows that plain hooks capture."""
    moments: dict[str, torch.Tensor] = {}

    def capture(name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        rows = _rows(module, x.detach().double())
        moments[name] = moments.get(name, 0) + rows.T @ rows

    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            partial(capture, name), with_kwargs=True
        )
        for name in projectors
    ]
    try:
        _outputs(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    for name, projector in projectors.items():
        moment, rows = moments[name], projector.components.double()
        best = torch.linalg.eigvalsh(moment)[: -projector.rank].sum().clamp(min=0)
        left = moment.trace() - (rows @ moment @ rows.T).trace()
        if left - best > EXCESS * moment.trace():
            raise WrongResultError(f"P of {name!r} misses {float(left / moment.trace()):.2g}")


def _step(model: nn.Module, batch: tuple[Any, ...], trained: set[str]) -> None:
    """Give every B values and a step of training; check that each has a gradient.

    Layers whose weights have none in the plain model are left out.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    optimizer = torch.optim.SGD(parameters, lr=1e-3)
    _loss(model, batch).backward()
    optimizer.step()
    silent = [
        name
        for name, layer in adapter_layers(model)
        if layer.lora_B["default"].grad is None and name in trained
    ]
    if silent:
        raise WrongResultError(f"no gradient for {silent[0]!r} and {len(silent) - 1} more")


def _outputs(model: nn.Module, batch: tuple[Any, ...]) -> list[torch.Tensor]:
    with torch.no_grad():
        return [value.clone() for value in _tensors(_seeded(lambda: model(*batch)))]


def _tensors(value: Any) -> list[torch.Tensor]:
    """Return the floating tensors of an output."""
    if isinstance(value, torch.Tensor):
        return [value] if value.is_floating_point() else []
    parts = value.values() if isinstance(value, dict) else value
    return (
        [t for part in parts for t in _tensors(part)]
        if isinstance(value, (dict, tuple, list))
        else []
    )


def _seeded(call: Callable[[], Any]) -> Any:
    torch.manual_seed(0)
    return call()


def _difference(first: list[torch.Tensor], second: list[torch.Tensor]) -> float:
    pairs = [(a, b) for a, b in zip(first, second, strict=True) if b.numel()]
    largest = max(float(b.abs().max()) for _, b in pairs) or 1.0
    return max(float((a - b).abs().max()) for a, b in pairs) / largest


def _equal(what: str, first: list[torch.Tensor], second: list[torch.Tensor]) -> None:
    if (difference := _difference(first, second)) > TOLERANCE:
        raise WrongResultError(f"{what} differ by {difference:.2g}")


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:160].replace("|", "/")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "?"


def main(names: list[str]) -> int:
    """Try the models; return the number of wrong ones."""
    warnings.simplefilter("ignore")
    lines, wrong = [], 0
    for package, model, make, inputs in MODELS:
        if names and package not in names:
            continue
        outcome = check(make, inputs)
        wrong += bool(outcome.wrong)
        missing = sorted({why.split(";")[0] for why in outcome.missing.values()})
        line = (
            f"| {package} {_version(package)} | {model} | {outcome.layers} | {outcome.verdict} | "
            f"{f'{len(outcome.missing)}: ' + ' / '.join(missing) if missing else ''} |"
        )
        print(line, flush=True)
        lines.append(line)
    if not names:
        head = ["| package | model | layers | verdict | layers without a projector |",
                "|---|---|---|---|---|"]  # fmt: skip
        (record.FOLDER / "foreign_walk.md").write_text("\n".join([*head, *lines, ""]))
    return wrong


if __name__ == "__main__":
    sys.exit(min(1, main(sys.argv[1:])))
