"""Table of all results, floors and targets: python -m benchmarks.summary [--quick]."""

import argparse
import json
from collections.abc import Callable
from typing import Any, NamedTuple

from benchmarks.record import FOLDER, table


class Row(NamedTuple):
    """A ratio, and how to find it in a results file.

    A target is the most that the ratio may be, or, with a plus, the least. The floor is the ratio
    if ours took no more than the operations and bytes that it cannot do without.
    """

    file: str
    measure: str
    target: str
    find: Callable[[dict[str, Any]], float | None]
    floor: str = ""


def _peer(name: str, figure: str = "time_ratio") -> Callable[[dict[str, Any]], float | None]:
    return lambda r: r["peers"][name][figure]


def _slope(name: str) -> Callable[[dict[str, Any]], float | None]:
    return lambda r: r["growth"][name]["slope"]


def _forward(name: str) -> Callable[[dict[str, Any]], float | None]:
    return lambda r: r["forward"][name]["time_ratio"]


ROWS = [
    Row(
        "learners",
        "default learner, long stream, over two float32 products, 4,096 features, NumPy",
        "1.3",
        lambda r: r["long_stream"]["RandomizedSVD"],
        "long_stream",
    ),
    Row(
        "learners",
        "the same, torch",
        "0.75",
        lambda r: r["long_stream"].get("RandomizedSVD, torch"),
    ),
    Row(
        "gpu",
        "the same, GPU",
        "1.4",
        lambda r: r["learners"]["torch"]["ratio"],
        "learners",
    ),
    Row(
        "gpu",
        "the same, GPU, CuPy",
        "1.4",
        lambda r: r["learners"].get("cupy", {}).get("ratio"),
        "learners",
    ),
    Row(
        "peers",
        "scikit-learn `IncrementalPCA` over ours, 4,096 features, 2,048 rows, rank 32",
        "150+",
        _peer("scikit-learn IncrementalPCA"),
        "scikit-learn IncrementalPCA",
    ),
    Row(
        "peers",
        "PEFT `IncrementalPCA` over ours, the same",
        "",
        _peer("PEFT IncrementalPCA"),
        "PEFT IncrementalPCA",
    ),
    Row(
        "peers",
        "PEFT `IncrementalPCA`, lowrank, over ours, the same",
        "",
        _peer("PEFT IncrementalPCA, lowrank"),
        "PEFT IncrementalPCA, lowrank",
    ),
    Row(
        "peers",
        "`torch.pca_lowrank`, all rows in memory, over ours, the same",
        "",
        _peer("torch.pca_lowrank, all rows in memory"),
        "torch.pca_lowrank, all rows in memory",
    ),
    Row(
        "peers_sklearn",
        "scikit-learn `IncrementalPCA` over `StreamingPCA`, 20,000 x 4,096, 64 components",
        "30+",
        lambda r: r["dense"]["IncrementalPCA"]["time_ratio"],
    ),
    Row(
        "peers_sklearn",
        "peak memory of `StreamingPCA` over that of `IncrementalPCA`, the same",
        "1",
        lambda r: r["dense"]["StreamingPCA"]["peak_mb"] / r["dense"]["IncrementalPCA"]["peak_mb"],
    ),
    Row(
        "peers_sklearn",
        "TF-IDF of 10,043 reviews, rank 50: excess error",
        "0.01",
        lambda r: r["sparse"]["fit_projector"]["excess"],
    ),
    Row(
        "peers_sklearn",
        "peak memory over the dense matrix, the same",
        "0.1",
        lambda r: r["sparse"]["fit_projector"]["peak_mb"] / r["sparse_as_dense_mb"],
    ),
    Row(
        "peers_sklearn",
        "scikit-learn `TruncatedSVD` (randomized) over `fit_projector`, the same",
        "",
        lambda r: r["sparse"]["TruncatedSVD"]["time_ratio"],
    ),
    Row(
        "torch_learning",
        "(forward + learning) / forward, MiniLM, all linear, rank 16, CPU",
        "1.15",
        lambda r: r["learning"]["ratio"],
        "learning",
    ),
    Row(
        "torch_learning",
        "the same, SmolLM2, rank 32, CPU",
        "1.20",
        lambda r: r["language_model"]["ratio"],
        "language_model",
    ),
    Row(
        "gpu",
        "the same, 8 blocks of LLaMA-3-8B's shapes, rank 32, bfloat16, 262,144 tokens, GPU",
        "1.10",
        lambda r: r["learning"]["ratio"],
        "learning",
    ),
    Row(
        "gpu",
        "the same, for each token after the first 65,536",
        "1.10",
        lambda r: r["learning"]["per_token"],
    ),
    Row(
        "torch_peers",
        "EVA's time over ours, MiniLM, 16 batches of 32, its defaults",
        "13+",
        _peer("EVA"),
        "EVA",
    ),
    Row("torch_peers", "CorDA's time over ours, the same 512 texts", "", _peer("CorDA"), "CorDA"),
    Row(
        "gpu",
        "EVA's time over ours, LLaMA-3-8B shapes, GPU",
        "10+",
        lambda r: r["learning"]["times_faster_than_eva"],
        "eva",
    ),
    Row(
        "torch_training",
        "training step over PEFT LoRA's, P frozen, CPU",
        "0.90",
        lambda r: r["step_ratio_median"]["lora"],
        "step, lora",
    ),
    Row(
        "torch_training",
        "training step over PEFT DoRA's, P frozen, CPU",
        "",
        lambda r: r["step_ratio_median"]["dora"],
        "step, dora",
    ),
    Row(
        "torch_training",
        "memory saved for the backward pass over PEFT LoRA's",
        "0.90",
        lambda r: r["saved_bytes"]["ipa"] / r["saved_bytes"]["lora"],
        "saved",
    ),
    Row(
        "torch_training",
        "inference: forward pass, adapter unmerged, over PEFT LoRA's",
        "0.90",
        lambda r: r["forward_ratio_median"]["lora"],
        "forward, lora",
    ),
    Row(
        "torch_training",
        "bfloat16: training step over PEFT LoRA's",
        "0.90",
        lambda r: r.get("bfloat16", {}).get("step_ratio_median", {}).get("lora"),
        "bfloat16 step, lora",
    ),
    Row(
        "torch_training",
        "bfloat16: forward pass, adapter unmerged, over PEFT LoRA's",
        "0.90",
        lambda r: r.get("bfloat16", {}).get("forward_ratio_median", {}).get("lora"),
        "bfloat16 forward, lora",
    ),
    Row(
        "gpu",
        "training step over PEFT LoRA's, GPU: time",
        "0.90",
        lambda r: r["training"]["lora"]["time_ratio"],
        "step",
    ),
    Row(
        "gpu",
        "training step over PEFT LoRA's, GPU: peak memory",
        "0.90",
        lambda r: r["training"]["lora"]["memory_ratio"],
    ),
    Row(
        "export",
        "export for servers over PEFT's `save_pretrained`, SmolLM2, rank 32: time",
        "",
        lambda r: r["time_ratio"],
        "time",
    ),
    Row("export", "... bytes", "", lambda r: r["size_ratio"], "size"),
    Row(
        "busy_machine",
        "update of the default learner beside two busy processes, over its two products, NumPy",
        "2.5",
        lambda r: r["numpy_beside_2"]["ratio"],
    ),
    Row("busy_machine", "... torch", "2.5", lambda r: r["torch_beside_2"]["ratio"]),
    Row("growth", "slope of time over rows, log-log", "1.1", _slope("rows")),
    Row("growth", "... over features", "1.1", _slope("features")),
    Row("growth", "... over rank", "1.1", _slope("rank")),
    Row("growth", "... over layers", "1.1", _slope("layers")),
    Row(
        "shared_projection",
        "16 tasks over one P over 16 LoRA adapters of PEFT, bytes on disk",
        "0.55",
        lambda r: r["storage_ratio"],
    ),
    *(
        Row(
            "shared_projection",
            f"the same, forward pass of a batch of 16 tasks, {name}, CPU",
            "0.8",
            _forward(name),
        )
        for name in ("1 token a row", "16 tokens a row", "64 tokens a row")
    ),
    Row(
        "short_streams",
        "default learner, largest excess error of four down projections of MPNet, 4,000 rows",
        "0.001",
        lambda r: r["largest_excess"]["RandomizedSVD"],
    ),
]


def summary(quick: bool) -> str:
    """Return the table; what has no results file was not measured."""
    rows = []
    for row in ROWS:
        path = FOLDER / f"{row.file}{'_quick' if quick else ''}.json"
        results = json.loads(path.read_text()) if path.is_file() else None
        value = _value(row, results)
        least = results.get("floors", {}).get(row.floor) if results else None
        shown = "not measured" if value is None else f"{value:.3g}"
        met = "" if value is None or not row.target else _met(value, row.target)
        beside = "" if least is None else f"{least:.3g}"
        command = f"`python -m benchmarks.{row.file}`"
        rows.append([row.measure, row.target, shown, beside, met, command])
    return table(["ratio", "target", "measured", "floor", "met", "command"], rows) + "\n"


def _value(row: Row, results: dict[str, Any] | None) -> float | None:
    """Return a row's ratio, or None where its benchmark has no results or was cut before it."""
    try:
        return row.find(results) if results else None
    except KeyError:
        if results and "ended" in results:
            return None
        raise


def _met(value: float, target: str) -> str:
    met = value >= float(target[:-1]) if target.endswith("+") else value <= float(target)
    return "yes" if met else "**no**"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="of the quick runs")
    quick = parser.parse_args().quick
    text = summary(quick)
    print(text)
    if not quick:
        (FOLDER / "summary.md").write_text(text)


if __name__ == "__main__":
    main()
