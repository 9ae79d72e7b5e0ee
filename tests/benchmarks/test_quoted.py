"""Numbers that pages quote are those of the results files."""

import json
import re
from pathlib import Path

import pytest

from benchmarks import gpu_table, summary
from benchmarks.evidence.cells import FOLDER as EVIDENCE
from benchmarks.evidence.cells import read
from benchmarks.evidence.statistics import mean_and_deviation, of_method
from benchmarks.record import FOLDER

ROOT = Path(__file__).parents[2]
MAIN = ["LoRA", "LoRA, half rank", "IPA, trainable", "IPA, frozen", "random A, frozen"]
#: Those that docs/questions.md quotes, too.
ASKED = {"LoRA", "IPA, trainable", "IPA, frozen"}


def short(value):
    return f"{value:.1e}".replace("e-0", "e-")


def mib(value):
    return f"{value / 2**20:.0f} MiB"


def eva(found):
    own, other = found["peers"]["ours"], found["peers"]["EVA"]
    ratio = other["time_ratio"]
    return [f"{ratio:.1f} times", short(own["excess_mean"]), f"{other['excess_mean']:.2f}"]


def learning(found):
    return [f"{found['learning']['ratio']:.2f}", short(found["learning"]["excess_mean"])]


def training(found):
    saved = found["saved_bytes"]
    return [f"{found['step_ratio_median']['lora']:.2f}", mib(saved["ipa"]), mib(saved["lora"])[:-4]]


QUOTED = [
    ("README.md", "time of a forward pass with learning", "torch_learning", learning),
    ("README.md", "learning P beside PEFT's EVA", "torch_peers", eva),
    ("README.md", "training step beside PEFT's LoRA", "torch_training", training),
    ("docs/torch.md", "(forward + learning) / forward", "torch_learning", learning),
    ("docs/torch.md", "16 batches of 32 reviews, beside EVA", "torch_peers", eva),
    ("docs/torch.md", "training step, frozen shared P", "torch_training", training),
]


def row(page, beginning):
    lines = (ROOT / page).read_text("utf-8").splitlines()
    (found,) = (line for line in lines if line.startswith(f"| {beginning}"))
    return found


@pytest.mark.parametrize(("page", "beginning", "file", "find"), QUOTED)
def test_row_has_the_numbers_of_its_file(page, beginning, file, find):
    wanted = find(json.loads((FOLDER / f"{file}.json").read_text()))
    cell = row(page, beginning)
    for text in wanted:
        assert re.search(rf"(?<![\d.]){re.escape(text)}", cell), f"{text} is not in: {cell}"


#: Tasks of the evidence with the methods of their rows in the README.
ACCURACIES = [
    ("accuracy on headlines, five seeds", "headlines", 5, MAIN),
    (
        "accuracy on CIFAR-10, ViT, eight seeds",
        "cifar10",
        8,
        [*MAIN[:2], "half inputs, half damped gradient", *MAIN[3:]],
    ),
]


@pytest.mark.parametrize(("beginning", "task", "seeds", "methods"), ACCURACIES)
def test_accuracies_of_the_readme(beginning, task, seeds, methods):
    cells = [cell for cell in read(EVIDENCE / "classification.jsonl") if cell.study == "main"]
    # Some methods have more seeds, for comparisons of their own.
    cells = [cell for cell in cells if cell.task == task and cell.seed < seeds]
    found = [
        mean_and_deviation([cell.accuracy for cell in of_method(cells, name)]) for name in methods
    ]
    means = ", ".join(f"{mean:.1f}" for mean, _ in found)
    deviations = [deviation for _, deviation in found]
    answers = (ROOT / "docs" / "questions.md").read_text("utf-8")
    for (mean, _), name in zip(found, methods, strict=True):
        assert name not in ASKED or f"{mean:.1f}" in answers, name
    wanted = f"| {means} % (± {min(deviations):.1f} to {max(deviations):.1f}) |"
    assert wanted in row("README.md", beginning)


def test_no_row_of_the_readme_is_left_out():
    table = (
        (ROOT / "README.md").read_text("utf-8").partition("## Measured")[2].partition("\n## ")[0]
    )
    rows = [line for line in table.splitlines() if line.startswith("| ")][1:]
    quoted = sum(page == "README.md" for page, *_ in QUOTED)
    assert len(rows) == quoted + len(ACCURACIES)


#: Columns of the verdict in docs/evidence.md, as results name their tasks.
TASKS = ["headlines", "reviews", "adjectives", "cifar10", "SmolLM2-135M adjectives 150 steps"]


def compared():
    """Return for (difference, task) its points with interval, from the tables of results."""
    lines = [
        line
        for name in ("claims", "own")
        for line in (EVIDENCE / f"{name}.md").read_text("utf-8").splitlines()
    ]
    cells = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in lines]
    return {(difference, task): points for _, difference, task, points, *_ in cells}


def test_verdict_of_the_evidence_is_of_the_results():
    page = (ROOT / "docs" / "evidence.md").read_text("utf-8")
    table = page.partition("| difference of | headlines |")[2].partition("\n\n")[0]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines()[2:]]
    assert len(rows) == 7
    found = compared()
    for difference, *cells in rows:
        for task, cell in zip(TASKS, cells, strict=True):
            points = found[difference, task]
            value, _, width = points.partition(" ± ")
            bold = cell.startswith("**")
            assert cell.strip("*") == points, (difference, task)
            assert not bold or abs(float(value)) >= float(width), (difference, task)


def test_likelihoods_of_the_evidence_are_of_the_results():
    page = (ROOT / "docs" / "evidence.md").read_text("utf-8")
    section = page.partition("\n## Language models by likelihood")[2].partition("\n## ")[0]
    tables = "".join(path.read_text("utf-8") for path in EVIDENCE.glob("likelihood_*.md"))
    quoted = re.findall(r"[+-]\d\.\d{3} ± \d\.\d{3}", section)
    assert len(quoted) >= 3
    assert [text for text in quoted if text not in tables] == []


def test_table_of_the_gpu_study_is_of_the_results():
    study = json.loads((FOLDER / "gpu.json").read_text("utf-8"))["study"]
    assert gpu_table.text(study) == (EVIDENCE / "likelihood_gpu.md").read_text("utf-8")


def test_summary_is_of_the_results():
    assert summary.summary(quick=False) == (FOLDER / "summary.md").read_text("utf-8")
