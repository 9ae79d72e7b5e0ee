"""Command line: an adapter directory that any trainer can start from, and a look into one."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, TaskType

from ipa_core import __version__
from ipa_core.errors import IPAError
from ipa_hf.adapter_metadata import AdapterRecord
from ipa_hf.calibration_data import CalibrationData
from ipa_hf.initialize import get_ipa_model
from ipa_torch import CheckpointConfig

#: How often the command writes down where learning stands.
SECONDS = 60.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command: 0 if it worked, 1 after a message on what is wrong, 130 if stopped."""
    chosen = _parser().parse_args(arguments)
    try:
        chosen.command(chosen)
    except (IPAError, ImportError, OSError, ValueError) as error:
        # The last three are how transformers says what it misses in a model's folder.
        print(f"ipa_hf: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; the same command goes on from where it was", file=sys.stderr)
        return 130
    return 0


def fit(chosen: argparse.Namespace) -> None:
    """Learn P for a model's layers and write an adapter that begins with it.

    Where learning stands is written beside the adapter, in ``OUT.learning``, from where the same
    command goes on if it was ended; with the adapter written, that is removed.
    """
    samples = CalibrationData(
        chosen.data,
        chosen.model,
        count=chosen.samples,
        batch_size=chosen.batch_size,
        max_length=chosen.max_length,
        seed=chosen.seed,
        trust_remote_code=chosen.trust_remote_code,
    )
    model = load_model(chosen.model, chosen.trust_remote_code, chosen.allow_pickle)
    causal = "CausalLM" in type(model).__name__
    config = LoraConfig(
        r=chosen.rank,
        lora_alpha=chosen.rank if chosen.alpha is None else chosen.alpha,
        target_modules=chosen.targets,
        task_type=TaskType.CAUSAL_LM if causal else None,
    )
    unfinished = chosen.out.with_name(f"{chosen.out.name}.learning")
    adapter = get_ipa_model(
        model,
        config,
        samples,
        trainable=chosen.trainable,
        scaling=chosen.scaling,
        on_missing="warn",
        max_bytes=chosen.max_bytes,
        checkpoint=CheckpointConfig(unfinished, seconds=SECONDS),
    )
    adapter.save_pretrained(str(chosen.out))
    shutil.rmtree(unfinished)
    print(table(AdapterRecord.read(chosen.out)))
    print(f"\nWritten to {chosen.out}: start any trainer of LoRA adapters from it.")


def show(chosen: argparse.Namespace) -> None:
    """Print the captured energy of each layer of an adapter, and plot it if asked."""
    record = AdapterRecord.read(chosen.adapter)
    print(table(record))
    if chosen.plot:
        plot(record, chosen.plot)


def load_model(name: str, trust_remote_code: bool, allow_pickle: bool) -> torch.nn.Module:
    """Load a model as the class it was saved from, so that names of layers are the trainer's."""
    config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    own = getattr(transformers, (config.architectures or [""])[0], None)
    remote = [name for name in getattr(config, "auto_map", {}) if name.startswith("AutoModel")]
    if remote and trust_remote_code:
        own = getattr(transformers, remote[0])
    options: dict[str, Any] = {"dtype": "auto", "trust_remote_code": trust_remote_code}
    if not allow_pickle:
        options["use_safetensors"] = True
    loader = transformers.AutoModel if own is None else own
    model: torch.nn.Module = loader.from_pretrained(name, **options)
    return model


def table(record: AdapterRecord) -> str:
    """Return a table of the layers: rank, captured energy, factor of P, rows learned from."""
    rows = [("rank", "captured", "factor", "samples", "layer")]
    for name, layer in record.layers.items():
        captured = f"{100 * layer.captured:.1f} %"
        numbers = (str(layer.rank), captured, f"{layer.factor:.4f}", f"{layer.samples:,}")
        rows.append((*numbers, name))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join([*map(str.rjust, row[:-1], widths[:-1]), row[-1]]) for row in rows]
    held = "held fixed" if record.frozen else "trained along with B"
    return "\n".join([*lines, f"\nA = factor * P, {held}; scaling {record.scaling}."])


def plot(record: AdapterRecord, path: Path) -> None:
    """Draw the captured energy of each layer as a bar."""
    from matplotlib.figure import Figure

    names = list(record.layers)
    figure = Figure(figsize=(8, 1 + 0.22 * len(names)), layout="constrained")
    axes = figure.subplots()
    axes.barh(names, [100 * layer.captured for layer in record.layers.values()], color="#0072b2")
    axes.invert_yaxis()
    axes.set(xlabel="captured energy (%)", xlim=(0, 100), ylim=(len(names) - 0.5, -0.5))
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="y", labelsize=7)
    figure.savefig(path, dpi=150)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ipa_hf", description=__doc__, epilog="More about it: docs/peft.md"
    )
    parser.add_argument("--version", action="version", version=f"ipa-projectors {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    learn = commands.add_parser("fit", help="learn projections and write an initial adapter")
    learn.set_defaults(command=fit)
    learn.add_argument("model", help="folder or name of a transformers model")
    learn.add_argument("data", type=Path, help="text file, .jsonl file or folder of images")
    learn.add_argument("--out", type=Path, required=True, help="adapter directory to write")
    learn.add_argument("--rank", type=int, default=8)
    learn.add_argument("--alpha", type=float, help="alpha of LoRA; default: the rank")
    learn.add_argument("--targets", type=_targets, help="q_proj,v_proj or all-linear")
    learn.add_argument("--scaling", type=_scaling, default="energy", help="energy, or a lambda")
    learn.add_argument("--trainable", action="store_true", help="train A along with B")
    learn.add_argument("--samples", type=int, default=1000, help="how many to learn from")
    learn.add_argument("--batch-size", type=int, default=8)
    learn.add_argument("--max-length", type=int, default=512, help="tokens of a text to keep")
    learn.add_argument("--max-bytes", type=int, help="memory for learners; more passes if short")
    learn.add_argument("--seed", type=int, default=0, help="of the draw of samples")
    learn.add_argument("--trust-remote-code", action="store_true", help="run the model's own code")
    learn.add_argument("--allow-pickle", action="store_true", help="load weights that can run code")

    look = commands.add_parser("show", help="print what an adapter's projections capture")
    look.set_defaults(command=show)
    look.add_argument("adapter", type=Path)
    look.add_argument("--plot", type=Path, help="picture to write")
    return parser


def _targets(text: str) -> str | list[str]:
    return text if text == "all-linear" else text.split(",")


def _scaling(text: str) -> str | float:
    return text if text == "energy" else float(text)


if __name__ == "__main__":
    raise SystemExit(main())
