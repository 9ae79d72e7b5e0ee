"""Command line: fit a projector to files of activations, show and compare projectors."""

from __future__ import annotations

import argparse
import io
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ipa_core import (
    ExactCovariance,
    HebbianRule,
    IncrementalPCA,
    IPAError,
    Learner,
    Projector,
    RandomizedSVD,
    ReconstructionAutoencoder,
    __version__,
    effective_rank,
    fit_projector,
    load,
    plotting,
    principal_angles,
    save,
)
from ipa_core._array import to_numpy
from ipa_core.documentation import page_path
from ipa_core.errors import PathError, StreamError
from ipa_core.io._formats.named_arrays import split_key
from ipa_core.io.activation_files import files_of
from ipa_core.io.atomic_write import check_writable, replace_file
from ipa_core.io.standard_output import flushed_output
from ipa_core.io.streams import LabeledBatch, labeled_batches
from ipa_core.text_table import align

LEARNERS: dict[str, type[Learner]] = {
    "covariance": ExactCovariance,
    "hebbian": HebbianRule,
    "incremental-pca": IncrementalPCA,
    "randomized-svd": RandomizedSVD,
    "autoencoder": ReconstructionAutoencoder,
}


class _ProgressStream:
    """Batches of a file with a progress bar; can be read repeatedly."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def labeled_batches(self) -> Iterator[LabeledBatch]:
        """Yield the label, rows and weights of each batch."""
        batches = labeled_batches(self.path)
        if find_spec("tqdm") is None:
            yield from batches
            return
        from tqdm.auto import tqdm

        with tqdm(unit=" rows", unit_scale=True, desc=self.path.name, disable=None) as bar:
            for label, batch, weights in batches:
                yield label, batch, weights
                bar.update(batch.shape[0])


def fit(args: argparse.Namespace) -> None:
    """Learn a projector from files and write it atomically."""
    _check_output(args.out, _input_files(args.activations))
    learner: Callable[[int], Learner] = partial(
        LEARNERS[args.learner], center=args.center, seed=args.seed
    )
    projector = fit_projector(_ProgressStream(args.activations), args.rank, learner=learner)
    save(projector, args.out)
    print(f"{projector!r} -> {args.out}")


def show(args: argparse.Namespace) -> None:
    """Print a table of the projectors in a file, and plot their energies."""
    projectors = _named(args.projectors, args.projectors.stem)
    print(_table([("", "rank", "features", "captured", "effective rank", "samples")], projectors))
    if args.plot is not None:
        if args.plot.is_dir():
            raise PathError(f"{args.plot}: expected a picture file to write, got a folder")
        plot = args.plot if args.plot.suffix else args.plot.with_suffix(".png")
        _check_output(plot, [args.projectors])
        replace_file(plot, _rendered(plotting.scree(projectors), plot.suffix[1:]))
        print(f"plot -> {plot}")


def compare(args: argparse.Namespace) -> None:
    """Print the principal angles between the projectors of two files, by name."""
    first, second = _named(args.first, "projector"), _named(args.second, "projector")
    common = [name for name in first if name in second]
    if not common:
        raise StreamError(f"expected a name that is in both files, got {[*first]} and {[*second]}")
    rows: list[tuple[str, ...]] = [("", "smallest", "median", "largest angle (degrees)")]
    for name in common:
        degrees = to_numpy(principal_angles(first[name], second[name])) * (180.0 / math.pi)
        median = degrees[len(degrees) // 2]
        rows.append((name, *(f"{value:.4f}" for value in (degrees[0], median, degrees[-1]))))
    print(align(rows, left={0}))
    for name in sorted(set(first) ^ set(second)):
        print(f"in one file only: {name}")


def _input_files(activations: Path) -> list[Path]:
    source, _ = split_key(activations)
    return [source, *files_of(source)]


def _check_output(out: Path, inputs: Iterable[Path]) -> None:
    """Raise unless ``out`` can be written and is neither an input nor inside of one."""
    target = check_writable(out)
    for source in inputs:
        if source.resolve() in (target, *target.parents):
            raise PathError(f"{out}: expected another file than the input {source}")


def _rendered(figure: Any, suffix: str) -> bytes:
    buffer = io.BytesIO()
    try:
        figure.savefig(buffer, format=suffix, dpi=150)
    except ValueError as error:
        raise PathError(f"expected a suffix of a picture format: {error}") from error
    return buffer.getvalue()


def _named(path: Path, single: str) -> Mapping[str, Projector]:
    content = load(path)
    return {single: content} if isinstance(content, Projector) else content


def _table(rows: list[tuple[str, ...]], projectors: Mapping[str, Projector]) -> str:
    for name, projector in projectors.items():
        rows.append(
            (
                name,
                str(projector.rank),
                str(projector.features),
                f"{projector.captured():.1%}",
                f"{effective_rank(projector):.1f}",
                f"{projector.samples:,}",
            )
        )
    return align(rows, left={0})


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    main = argparse.ArgumentParser(
        prog="python -m ipa_core",
        description="Learn low-rank projectors from activations.",
        epilog=f"More about it: {page_path('docs/activations.md')}",
    )
    main.add_argument("--version", action="version", version=f"ipa-projectors {__version__}")
    commands = main.add_subparsers(required=True, metavar="COMMAND")

    command = _command(commands, "fit", fit)
    command.add_argument(
        "activations",
        type=Path,
        help="a file (.npy, .safetensors, .parquet, ...), FILE#NAME, or a folder",
    )
    command.add_argument("--rank", type=int, required=True)
    command.add_argument("--out", type=Path, required=True, help="the .safetensors file to write")
    command.add_argument("--learner", choices=sorted(LEARNERS), default="randomized-svd")
    command.add_argument("--center", action="store_true", help="learn about the mean")
    command.add_argument("--seed", type=int, default=0)

    command = _command(commands, "show", show)
    command.add_argument("projectors", type=Path)
    command.add_argument("--plot", type=Path, help="write a scree plot to this file")

    command = _command(commands, "compare", compare)
    command.add_argument("first", type=Path)
    command.add_argument("second", type=Path)
    return main


def _command(commands: Any, name: str, run: Callable[[argparse.Namespace], None]) -> Any:
    text = (run.__doc__ or "").rstrip(".")
    command = commands.add_parser(name, help=text, description=text)
    command.set_defaults(run=run)
    return command


def main(arguments: Iterable[str] | None = None) -> int:
    """Run a command; return 0, or 1 after an error, 2 on wrong usage, 130 if interrupted."""
    args = parser().parse_args(None if arguments is None else list(arguments))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names that a terminal cannot show
    try:
        with flushed_output():
            args.run(args)
    except BrokenPipeError:  # the reader of the output has gone, as `head` does
        return 1
    except (IPAError, OSError, MemoryError) as error:
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"error: {message}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
