"""Adapt tiny models of all families of transformers by default: python -m benchmarks.hf_families.

Writes ``results/hf_families.json`` after each family, from which an interrupted walk resumes, and
``results/hf_families.md``: the families that work, those that are refused, with the reason, and the
share of the blocks' weights that the default targets cover. ``run`` says if the model ran: where
its inputs are of a form that is not known here, targets, PEFT's injection and initialization are
checked with given projectors alone.
"""

import itertools
import json
import signal
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import transformers
from peft import LoraConfig, PeftModel
from torch import nn

import ipa_hf
from benchmarks import record
from benchmarks.hf_models import Kind, batches, build, builds, families, outputs
from benchmarks.hf_moe_families import difference, randomize
from ipa_core import Projector
from ipa_core.errors import IPAError, SettingError
from ipa_hf.block_coverage import warn_of_small_coverage
from ipa_hf.lora_layers import lora_layers
from ipa_torch import select_layers
from ipa_torch.extension import features_of

RANK = 2
SECONDS = 60
#: Classes of a family that are tried, and sizes of each.
CLASSES, SIZES_TRIED = 3, 2
#: Relative difference of equal outputs, at most.
TOLERANCE = 1e-5
JSON = record.FOLDER / "hf_families.json"


class OutOfTimeError(Exception):
    """A family took too long."""


@dataclass(frozen=True)
class Found:
    """Result of a family."""

    model: str
    layers: int = 0
    coverage: float = 0.0
    warned: bool = False  # of a coverage below a half
    ran: bool = False
    begun: float = 0.0  # the adapted model with B = 0, and the model
    effect: float = 0.0  # the adapted model with B at random, and the model
    stock: float = 0.0  # the model with the saved adapter as PEFT loads it, and the adapted one
    refused: str = ""
    not_tried: str = ""
    error: str = ""

    @property
    def works(self) -> bool:
        """True if an adapter starts without effect, then has one, and PEFT loads it."""
        said = self.coverage >= 0.5 or self.warned
        same = max(self.begun, self.stock) < TOLERANCE
        effect = not self.ran or self.effect > 10 * max(self.begun, 1e-7)
        return bool(self.layers) and not self.error and said and same and effect

    @property
    def verdict(self) -> str:
        """Verdict in a word."""
        if self.works:
            return "works"
        if self.not_tried:
            return "not tried"
        return "refused" if self.refused and not self.error else "FAILS"


def check(family: str, kinds: list[Kind]) -> Found:
    """Adapt the first class of a family of which a small model can be made and run.

    If none runs, the first that can be made is adapted from given projectors.
    """
    not_run: Found | None = None
    for kind in kinds[:CLASSES]:
        for model in itertools.islice(builds(family, kind), SIZES_TRIED):
            batch, base = _runnable(model)
            if batch is not None:
                return adapt(model, batch, base)
            not_run = not_run or adapt(model, None, base)
    return not_run or _on_meta(kinds)


def _on_meta(kinds: list[Kind]) -> Found:
    """Return the targets of a model of full size without weights, where no small one is made."""
    reason = "no model can be made from the default configuration"
    for kind in kinds[:CLASSES]:
        try:
            with torch.device("meta"):
                model = kind(kind.config_class())
        except ImportError as error:  # timm, for example
            reason = " ".join(str(error).split())[:100]
            continue
        except Exception:  # settings that have no default
            continue
        return adapt(model, None, torch.empty(0))
    return Found(kinds[0].__name__, not_tried=reason)


def _runnable(model: nn.Module) -> tuple[dict[str, torch.Tensor] | None, torch.Tensor]:
    """Return inputs on which a model runs, and its outputs."""
    for batch in batches(model):
        try:
            return batch, outputs(model, batch)
        except OutOfTimeError:
            raise
        except Exception:  # inputs of another form
            continue
    return None, torch.empty(0)


def adapt(model: Any, batch: dict[str, torch.Tensor] | None, base: torch.Tensor) -> Found:
    """Adapt a model by default, randomize B, and load the saved adapter with PEFT."""
    kind, config = type(model), model.config
    try:
        targets = ipa_hf.default_targets(model)
    except SettingError as error:
        return Found(kind.__name__, ran=batch is not None, refused=str(error).partition(";")[0])
    coverage = ipa_hf.target_coverage(model, targets)
    lora = LoraConfig(r=RANK, lora_alpha=RANK)
    with warnings.catch_warnings(record=True) as raised:
        warnings.simplefilter("always")
        data: Any = [batch]
        if any(parameter.is_meta for parameter in model.parameters()):
            warn_of_small_coverage(model, targets)
            warned = bool(raised)
            return Found(kind.__name__, len(_linear(model)), coverage, warned)
        if batch is None:
            data = {name: _projector(layer) for name, layer in _linear(model).items()}
        options: Any = {} if batch is None else {"progress": False}
        try:
            adapted = ipa_hf.get_ipa_model(model, lora, data, **options)
        except IPAError as error:
            return Found(kind.__name__, coverage=coverage, refused=str(error)[:300])
    warned = any("the default targets cover" in str(warning.message) for warning in raised)
    count = len(lora_layers(adapted, "default"))
    if batch is None:
        return Found(kind.__name__, count, coverage, warned)
    begun = difference(outputs(adapted, batch), base)
    randomize(adapted)
    changed = outputs(adapted, batch)
    with tempfile.TemporaryDirectory() as folder:
        adapted.save_pretrained(folder)
        again = PeftModel.from_pretrained(build(kind, config), folder)
        stock = difference(outputs(again, batch), changed)
    effect = difference(changed, base) if changed.shape == base.shape else 1.0
    return Found(kind.__name__, count, coverage, warned, True, begun, effect, stock)


def _linear(model: nn.Module) -> dict[str, nn.Module]:
    return select_layers(model, ipa_hf.default_targets(model))


def _projector(layer: nn.Module) -> Projector:
    features = features_of(layer)
    rows, energies = np.eye(RANK, features, dtype="f4"), np.ones(RANK, "f4")
    return Projector(rows, np.zeros(features, "f4"), energies, 2.0 * RANK, 1)


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Raise `OutOfTimeError` after some seconds."""

    def stop(*_: Any) -> None:
        raise OutOfTimeError(f"more than {seconds} seconds")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def walk(known: dict[str, Found]) -> Iterator[tuple[str, Found]]:
    """Yield the result of each family; those that are known are not tried again."""
    for family, kinds in families().items():
        if family in known:
            yield family, known[family]
            continue
        try:
            with time_limit(SECONDS), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = check(family, kinds)
        except OutOfTimeError as error:
            found = Found(kinds[0].__name__, not_tried=str(error))
        except Exception as error:  # reported as a failure of the family
            found = Found(kinds[0].__name__, error=f"{type(error).__name__}: {error}"[:300])
        print(f"{family}: {found.verdict} {found}", flush=True)
        yield family, found


def report(found: dict[str, Found]) -> str:
    """Return the table of all families."""
    rows = [
        [
            family,
            f"`{x.model}`",
            x.verdict,
            str(x.layers),
            f"{x.coverage:.0%}" if x.layers else "-",
            "yes" if x.ran else "no",
            f"{x.effect:.1g}" if x.ran and x.layers else "-",
            f"{max(x.begun, x.stock):.0e}" if x.ran and x.layers else "-",
            (x.error or x.refused or x.not_tried).replace("|", "/").replace("\n", " ")[:200],
        ]
        for family, x in found.items()
    ]
    works = sum(x.works for x in found.values())
    refused = sum(x.verdict == "refused" for x in found.values())
    failed = sum(x.verdict == "FAILS" for x in found.values())
    small = sum(x.works and x.coverage < 0.5 for x in found.values())
    header = ["family", "model", "verdict", "layers", "covered", "run", "effect", "error", "reason"]
    return (
        f"transformers {transformers.__version__}: {len(found)} families, {works} work "
        f"({sum(x.works and x.ran for x in found.values())} of them were run; {small} with a "
        f"warning that less than half is covered), {refused} refused, "
        f"{len(found) - works - refused - failed} not tried, {failed} fail.\n\n"
        f"{record.table(header, rows)}\n"
    )


def main() -> int:
    """Walk, and write; the exit status is the number of families that fail."""
    transformers.logging.set_verbosity_error()
    version = transformers.__version__
    stored = json.loads(JSON.read_text()) if JSON.exists() else {}
    again = "--resume" in sys.argv[1:] and stored.get("transformers") == version
    known = {name: Found(**x) for name, x in stored["families"].items()} if again else {}
    found: dict[str, Found] = {}
    for family, result in walk(known):
        found[family] = result
        content = {name: asdict(x) for name, x in (known | found).items()}
        JSON.write_text(json.dumps({"transformers": version, "families": content}, indent=1) + "\n")
    (record.FOLDER / "hf_families.md").write_text(report(found))
    return sum(x.verdict == "FAILS" for x in found.values())


if __name__ == "__main__":
    sys.exit(main())
