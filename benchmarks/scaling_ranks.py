"""Results and traffic of 1, 2 and 4 processes that learn over MiniLM together.

    python -m benchmarks.scaling_ranks [--quick]

The same reviews are dealt out to the processes (gloo, one thread each). Compared are the results
with those of one process, their excess over the optimum, and the bytes that a process sends with
those of gathering activations as PEFT's EVA does: every distinct input of every batch goes to all
others, which is done here, in the same processes, on the same batches. Bytes are counted where
torch.distributed is called: payload times receivers.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn

from benchmarks import record
from benchmarks.torch_learning import PACKAGES, RANK, cut, excess, linear, load, moments
from ipa_core import principal_angles
from ipa_torch import LayerProjectors, fit_projectors

ROWS = 20_000
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]


class Meter:
    """Counts what this process sends, from ``__enter__`` on."""

    def __init__(self) -> None:
        self.sent = 0
        self._names = ["send", "broadcast", "all_gather", "all_reduce"]

    def __enter__(self) -> "Meter":
        self._originals = {name: getattr(distributed, name) for name in self._names}
        for name in self._names:
            setattr(distributed, name, self._counting(name, self._originals[name]))
        return self

    def __exit__(self, *_: object) -> None:
        for name in self._names:
            setattr(distributed, name, self._originals[name])

    def _counting(self, name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
        me, others = distributed.get_rank(), distributed.get_world_size() - 1

        def call(first: Any, *rest: Any, **options: Any) -> Any:
            mine = rest[0] if name == "all_gather" else first
            if name == "send":
                self.sent += mine.nbytes
            elif name != "broadcast" or rest[0] == me:
                self.sent += mine.nbytes * others
            return plain(first, *rest, **options)

        return call


def gather(model: nn.Module, batches: list[Any]) -> tuple[int, float, int]:
    """Send all distinct inputs of the layers to everybody; return bytes, seconds and rows."""
    size, rows, spent = distributed.get_world_size(), 0, 0.0
    seen: set[int] = set()

    def hear(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        nonlocal spent
        x = args[0]
        if id(x) in seen:
            return
        seen.add(id(x))
        held.append(x)
        mine = x[mask].contiguous()
        start = time.perf_counter()
        counts = [torch.zeros(1, dtype=torch.int64) for _ in range(size)]
        distributed.all_gather(counts, torch.tensor([len(mine)]))
        most = max(int(count) for count in counts)
        padded = torch.zeros(most, mine.shape[1])
        padded[: len(mine)] = mine
        distributed.all_gather([torch.empty_like(padded) for _ in range(size)], padded)
        spent += time.perf_counter() - start

    layers = [m for name, m in model.named_modules() if linear(name, m)]
    handles = [layer.register_forward_pre_hook(hear) for layer in layers]
    with Meter() as meter, torch.no_grad():
        for batch in batches:
            held: list[torch.Tensor] = []
            mask = batch["attention_mask"].bool()
            rows += int(mask.sum())
            model(**batch)
            seen.clear()
    for handle in handles:
        handle.remove()
    return meter.sent, spent, rows


def work(folder: Path, count: int) -> None:
    """Learn in one process and write its result and traffic to the folder."""
    distributed.init_process_group("gloo")
    rank, size = distributed.get_rank(), distributed.get_world_size()
    torch.set_num_threads(1)
    model, tokenizer, texts = load()
    batches = cut(tokenizer, texts, 64, count)[rank::size]
    with Meter() as meter:
        start = time.perf_counter()
        projectors = fit_projectors(model, batches, RANK, targets=linear, progress=False)
        seconds = time.perf_counter() - start
    gathered, gathering_s, rows = gather(model, batches)
    projectors.save(folder / f"{rank}.safetensors")
    torch.save(
        {
            "sent": meter.sent,
            "seconds": seconds,
            "rows": rows,
            "gathered": gathered,
            "gathering_s": gathering_s,
        },
        folder / f"{rank}.pt",
    )
    distributed.destroy_process_group()


def launch(
    size: int, count: int, oracle: LayerProjectors, single: LayerProjectors | None
) -> dict[str, Any]:
    """Start the processes and compare what they found."""
    with tempfile.TemporaryDirectory() as scratch:
        command = [*TORCHRUN, str(size), "-m", "benchmarks.scaling_ranks"]
        subprocess.run([*command, "--work", scratch, "--count", str(count)], check=True)
        folder = Path(scratch)
        found = [LayerProjectors.load(folder / f"{rank}.safetensors") for rank in range(size)]
        told = [torch.load(folder / f"{rank}.pt") for rank in range(size)]
    for other in found[1:]:
        assert all(torch.equal(other[n].components, found[0][n].components) for n in found[0])
    first = found[0]
    excesses = [excess(p.components, oracle[name]) for name, p in first.items()]
    result: dict[str, Any] = {
        "processes": size,
        "rows_a_process": [entry["rows"] for entry in told],
        "the_same_to_the_bit": True,
        "excess_mean": sum(excesses) / len(excesses),
        "excess_max": max(excesses),
        "seconds": max(entry["seconds"] for entry in told),
    }
    if size > 1:
        sent = max(entry["sent"] for entry in told)
        a_row = max(entry["gathered"] / entry["rows"] for entry in told)
        result |= {
            "sent_bytes_max": sent,
            "gathering_bytes_max": max(entry["gathered"] for entry in told),
            "gathering_seconds_max": max(entry["gathering_s"] for entry in told),
            "fewer_at_20000_rows": a_row * ROWS / sent,
            "equal_at_rows": sent / a_row,
        }
    if single is not None:
        degrees = [
            float(principal_angles(single[name], p)[-1]) * 57.29578 for name, p in first.items()
        ]
        result |= {
            "angle_to_one_process_median_deg": sorted(degrees)[len(degrees) // 2],
            "angle_to_one_process_max_deg": max(degrees),
        }
    result["projectors"] = first
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a quarter of the reviews")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--count", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        return work(args.work, args.count)
    model, tokenizer, texts = load()
    count, rows = 0, 0
    for batch in cut(tokenizer, texts, 64, len(texts)):
        if rows >= (ROWS if args.quick else 4 * ROWS):
            break
        rows, count = rows + int(batch["attention_mask"].sum()), count + 1
    count = -(-count // 4) * 4
    torch.set_num_threads(1)
    oracle = moments(model, cut(tokenizer, texts, 64, count))
    results: list[dict[str, Any]] = []
    single = None
    for size in (1, 2, 4):
        result = launch(size, count, oracle, single)
        found = result.pop("projectors")
        single = found if single is None else single
        print(result, flush=True)
        results.append(result)
    record.write("scaling_ranks", args.quick, PACKAGES, {"rank": RANK, "runs": results})


if __name__ == "__main__":
    main()
