"""Command line: write an initialized adapter for any trainer, or inspect one."""

from __future__ import annotations

import argparse
import io
import math
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from peft import LoraConfig, TaskType

from ipa_core import __version__
from ipa_core.documentation import page_path
from ipa_core.errors import IPAError, PathError, SettingError, first_cause
from ipa_core.io.atomic_write import replace_file
from ipa_core.io.paths import as_path
from ipa_core.io.standard_output import flushed_output
from ipa_core.text_table import align
from ipa_hf.adapter_directory import check_output, save_adapter
from ipa_hf.adapter_metadata import AdapterMetadata, find_metadata
from ipa_hf.calibration_data import CalibrationData
from ipa_hf.first_token_mask import without_first_token
from ipa_hf.initialize import get_ipa_model
from ipa_hf.model_files import file_errors, load_model
from ipa_torch import CheckpointConfig, attention_mask
from ipa_torch.extension import remove_checkpoints

#: Seconds between two checkpoints of a fit.
CHECKPOINT_SECONDS = 60.0
#: Of docs/evidence.md.
RATE = (
    "With A frozen, start at ten times LoRA's learning rate for a causal language model, "
    "at three times for other models; tune it."
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status: 0, 1 after an error, 130 after Ctrl-C."""
    command: Callable[[argparse.Namespace], None] | None = None
    try:
        args = _parser().parse_args(arguments)
        command = args.command
        with flushed_output():
            args.command(args)
    except BrokenPipeError:  # the reader of the output has gone, as `head` does
        return 1
    except (IPAError, ImportError, OSError, ValueError) as error:
        broken = isinstance(error, ImportError) and not isinstance(error, IPAError)
        text = f"{error} ({first_cause(error)})" if broken else str(error)
        print(f"ipa_hf: {' '.join(text.split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        again = "; run the same command again to resume" if command is fit else ""
        print(f"ipa_hf: stopped{again}", file=sys.stderr)
        return 130
    return 0


def fit(args: argparse.Namespace) -> None:
    """Fit projectors of a model's layers and write an adapter initialized from them.

    Checkpoints of the fit go into ``OUT.learning`` beside the adapter. The same command resumes
    from them; they are removed once the adapter is written. Until then ``OUT`` stays as it was.
    """
    out = check_output(args.out, [Path(args.model), args.data])
    samples = CalibrationData(
        args.data,
        args.model,
        count=args.samples,
        batch_size=args.batch_size,
        max_length=args.max_length,
        seed=args.seed,
        trust_remote_code=args.trust_remote_code,
    )
    model = load_model(args.model, args.trust_remote_code, args.allow_pickle)
    causal = "CausalLM" in type(model).__name__
    config = LoraConfig(
        r=args.rank,
        lora_alpha=args.rank if args.alpha is None else args.alpha,
        target_modules=args.targets,
        task_type=TaskType.CAUSAL_LM if causal else None,
    )
    checkpoint = out.with_name(f"{out.name}.learning")
    expected = f"a model that computes its outputs from {args.data}"
    with file_errors(expected, "give other data, or the tokenizer of the model"):
        adapter = get_ipa_model(
            model,
            config,
            samples,
            trainable=args.trainable,
            scaling=args.scaling,
            row_weights=without_first_token if args.without_first_token else attention_mask,
            max_bytes=args.max_bytes,
            checkpoint=CheckpointConfig(checkpoint, seconds=CHECKPOINT_SECONDS),
        )
    metadata = find_metadata(adapter)
    if metadata is None:
        raise SettingError(
            f"expected linear layers among the targets, got none in {args.targets}; name others "
            "with --targets"
        )
    save_adapter(adapter, out)
    remove_checkpoints(checkpoint)
    print(table(metadata))
    print(f"\nWritten to {args.out}; pass it to any trainer that starts from a LoRA adapter.")


def show(args: argparse.Namespace) -> None:
    """Print the captured energy of each layer of an adapter, and plot it with ``--plot``."""
    metadata = AdapterMetadata.read(args.adapter)
    print(table(metadata))
    if args.plot:
        plot(metadata, args.plot)


def table(metadata: AdapterMetadata) -> str:
    """Return a table of the layers: rank, captured energy, scale of P, number of rows."""
    rows = [("rank", "captured", "scale", "samples", "layer")]
    for name, layer in metadata.layers.items():
        captured = f"{100 * layer.captured:.1f} %"
        numbers = (str(layer.rank), captured, f"{layer.scale:.4f}", f"{layer.samples:,}")
        rows.append((*numbers, name))
    training = "frozen" if metadata.frozen else "trained with B"
    summary = f"A = scale * P, {training}; scaling {metadata.scaling}; "
    summary += f"rows by {metadata.row_weights or 'weights not recorded'}."
    if metadata.frozen:
        summary += f"\n{RATE}"
    return f"{align(rows, left={4})}\n\n{summary}"


def plot(metadata: AdapterMetadata, path: Path) -> None:
    """Draw the captured energy of each layer as a bar."""
    from matplotlib.figure import Figure

    names = list(metadata.layers)
    figure = Figure(figsize=(8, 1 + 0.22 * len(names)), layout="constrained")
    axes = figure.subplots()
    axes.barh(names, [100 * layer.captured for layer in metadata.layers.values()], color="#0072b2")
    axes.invert_yaxis()
    axes.set(xlabel="captured energy (%)", xlim=(0, 100), ylim=(len(names) - 0.5, -0.5))
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="y", labelsize=7)
    image = io.BytesIO()
    figure.savefig(image, format=path.suffix[1:] or "png", dpi=150)
    replace_file(path, image.getvalue())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ipa_hf", description=__doc__, epilog=f"Guide: {page_path('docs/peft.md')}"
    )
    parser.add_argument("--version", action="version", version=f"ipa-projectors {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    learn = commands.add_parser(
        "fit",
        help="fit projectors and write an initialized adapter",
        usage="%(prog)s MODEL DATA --out DIRECTORY [options]",
    )
    learn.set_defaults(command=fit)
    learn.add_argument("model", help="folder or name of a transformers model")
    learn.add_argument("data", type=_path, help="text file, .jsonl file or folder of images")
    learn.add_argument("--out", type=_path, required=True, help="adapter directory to write")
    learn.add_argument("--rank", type=_count, default=8)
    learn.add_argument("--alpha", type=_alpha, help="alpha of LoRA; default: the rank")
    learn.add_argument("--targets", type=_targets, help="q_proj,v_proj or all-linear")
    learn.add_argument("--scaling", type=_scaling, default="energy", help="energy, or a lambda")
    learn.add_argument("--trainable", action="store_true", help="train A as well as B")
    learn.add_argument("--samples", type=_count, default=1000, help="number of calibration samples")
    learn.add_argument("--batch-size", type=_count, default=8)
    learn.add_argument("--max-length", type=_count, default=512, help="tokens kept of each text")
    learn.add_argument(
        "--without-first-token",
        action="store_true",
        help="exclude the first token of each text, an attention sink in many language models",
    )
    learn.add_argument("--max-bytes", type=_count, help="memory limit of the learners")
    learn.add_argument("--seed", type=int, default=0, help="seed of the random choice of samples")
    learn.add_argument(
        "--trust-remote-code", action="store_true", help="run code that comes with the model"
    )
    learn.add_argument(
        "--allow-pickle", action="store_true", help="load pickled weights, which can run code"
    )

    look = commands.add_parser("show", help="print the captured energy of each layer")
    look.set_defaults(command=show)
    look.add_argument("adapter", type=_path)
    look.add_argument("--plot", type=_path, help="image file to write")
    return parser


def _path(text: str) -> Path:
    try:
        return as_path(text)
    except PathError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _count(text: str) -> int:
    if text.isdecimal() and int(text) > 0:
        return int(text)
    raise argparse.ArgumentTypeError(f"expected an integer of at least 1, got {text!r}")


def _targets(text: str) -> str | list[str]:
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise argparse.ArgumentTypeError(f"expected names between commas, got {text!r}")
    return text if text == "all-linear" else names


def _alpha(text: str) -> float:
    return _number(text, "a finite number other than 0", lambda x: math.isfinite(x) and x != 0)


def _scaling(text: str) -> str | float:
    positive = "'energy' or a positive finite number"
    return text if text == "energy" else _number(text, positive, lambda x: 0 < x < math.inf)


def _number(text: str, form: str, valid: Callable[[float], bool]) -> float:
    with suppress(ValueError):
        if valid(number := float(text)):
            return number
    raise argparse.ArgumentTypeError(f"expected {form}, got {text!r}")


if __name__ == "__main__":
    raise SystemExit(main())
