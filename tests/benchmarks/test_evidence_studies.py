"""Studies: chosen on validation, resumable, tested once; statistics, tables and figures."""

import json
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from benchmarks.classification import LossStudy
from benchmarks.evidence import claims, figures, vision
from benchmarks.evidence.cells import TUNING, Cell, Cells, read
from benchmarks.evidence.methods import BEYOND, COMPARED, LEARNED, METHODS, Adapter
from benchmarks.evidence.statistics import Difference, of_method, paired, pooled
from benchmarks.evidence.study import RATES, Study
from benchmarks.evidence.tables import tables
from benchmarks.evidence.task import Settings, collate
from benchmarks.evidence.texts import TextTask
from tests.benchmarks import evidence_models as tiny

SETTINGS = Settings(rank=2, steps=6, batch_size=16, learn_from=32)
CELL = Cell(
    study="main",
    task="toy",
    method="LoRA",
    rank=8,
    steps=100,
    learn_from=320,
    seed=0,
    rate=1e-2,
    validation={"toy": 0.5},
    test={"toy": 0.5},
    steps_of_p=0,
    trainable=10,
    mebibytes=1.0,
    seconds_of_p=0.0,
    seconds=1.0,
)


def cells(method, accuracies, **changes):
    return [
        replace(CELL, method=method, seed=seed, test={"toy": value}, **changes)
        for seed, value in enumerate(accuracies)
    ]


def tuned(method, accuracies):
    return [
        replace(CELL, method=method, seed=TUNING + n, rate=rate, validation={"toy": value})
        for rate, values in accuracies.items()
        for n, value in enumerate(values)
    ]


@pytest.fixture
def study(tmp_path):
    task = TextTask(
        "toy",
        adapted=1,
        rows=tiny.rows(120),
        folder=tiny.bert(tmp_path / "bert"),
        sizes=(60, 40, 30, 30),
    )
    return Study("main", task, SETTINGS, Cells(tmp_path / "cells.jsonl", "python -m toy"))


def test_study(study):
    study.run(["LoRA", "IPA, frozen"], range(2))
    lines = study.cells.path.read_text().splitlines()
    run = json.loads(lines[0])["run"]
    assert run["command"] == "python -m toy"
    assert {"date", "machine", "versions"} < set(run)
    found = list(read(study.cells.path))
    assert len(found) == len(lines) - 1 == len({cell.key for cell in found})
    for name in ("LoRA", "IPA, frozen"):
        own = [cell for cell in found if cell.method == name]
        tuned = {cell.rate: cell.validated for cell in own if cell.seed == TUNING}
        assert all((cell.test is None) == (cell.seed == TUNING) for cell in own)
        (rate,) = {cell.rate for cell in own if cell.seed != TUNING}
        assert tuned[rate] == max(tuned.values())
        place = RATES.index(rate)
        assert {RATES[i] for i in (place - 1, place + 1) if 0 <= i < len(RATES)} <= set(tuned)


def test_rate_is_the_best_on_average_over_seeds(study):
    replace(study, tuned_on=2).run(["LoRA"], range(1))
    found = list(read(study.cells.path))
    tuning = [cell for cell in found if cell.seed >= TUNING]
    assert all(cell.test is None for cell in tuning)
    means = {}
    for rate in {cell.rate for cell in tuning}:
        own = {cell.seed: cell.validated for cell in tuning if cell.rate == rate}
        assert set(own) == {TUNING, TUNING + 1}
        means[rate] = sum(own.values()) / 2
    (tested,) = (cell for cell in found if cell.seed < TUNING)
    assert means[tested.rate] == max(means.values())
    assert of_method(found, "LoRA") == [tested]


def test_study_of_losses_takes_the_rate_of_least_loss(study):
    losses = LossStudy("loss", study.task, SETTINGS, study.cells)
    losses.run(["LoRA"], range(1))
    found = list(read(study.cells.path))
    tuning = [cell for cell in found if cell.seed >= TUNING]
    (tested,) = (cell for cell in found if cell.seed < TUNING)
    assert tested.rate == min(tuning, key=lambda cell: cell.validation["toy"]).rate


def test_loss_of_a_part_is_the_mean_over_its_examples(study):
    model, part = study.task.fresh(0), study.task._parts["test"]
    each = [float(study.task.loss(model, collate([example])).detach()) for example in part]
    assert study.task.nats(model, "test")["toy"] == pytest.approx(sum(each) / len(part), rel=1e-4)


def test_study_goes_on_where_it_was(study):
    study.run(["LoRA"], range(2))
    written = study.cells.path.read_text()
    lines = written.splitlines()
    again = replace(study, cells=Cells(study.cells.path, "python -m toy"))
    again.run(["LoRA"], range(2))
    assert study.cells.path.read_text() == written
    study.cells.path.write_text("\n".join(lines[:-1]) + "\n")
    resumed = replace(study, cells=Cells(study.cells.path, "python -m toy"))
    resumed.run(["LoRA"], range(2))
    last = json.loads(study.cells.path.read_text().splitlines()[-1])
    lost = json.loads(lines[-1])
    assert {**last, "seconds": 0, "seconds_of_p": 0} == {**lost, "seconds": 0, "seconds_of_p": 0}


def test_same_seed_same_cell(study, tmp_path):
    adapter = Adapter(study.task, SETTINGS)
    first = study.cell(adapter, "gradient, frozen", 0, 1e-2)
    other = replace(study, cells=Cells(tmp_path / "other.jsonl", ""))
    second = other.cell(Adapter(study.task, SETTINGS), "gradient, frozen", 0, 1e-2)
    assert (first.test, first.validation) == (second.test, second.validation)


def test_paired_difference():
    one, other = [0.81, 0.84, 0.80], [0.80, 0.82, 0.81]
    found = paired(cells("IPA, frozen", one), cells("LoRA", other))
    interval = stats.ttest_rel(one, other).confidence_interval()
    assert found.mean - found.half == pytest.approx(100 * interval.low)
    assert found.mean + found.half == pytest.approx(100 * interval.high)
    assert not found.clear
    with pytest.raises(ValueError, match="expected at least 2 seeds in common, got 1"):
        paired(cells("IPA, frozen", one), cells("LoRA", other[:1]))


def test_mean_difference_over_tasks():
    """With the task as a factor, it is the intercept of least squares; tested against the fit."""
    values = [[1.0, 2.0, 4.0], [5.0, 5.5], [-1.0, 0.0, 0.5, 2.0]]
    groups = [(cells("LoRA", some), cells("IPA, frozen", [0.0] * len(some))) for some in values]
    found = pooled(groups, lambda cell: cell.test["toy"])
    design = np.zeros((9, 3))
    for row, task in enumerate([0] * 3 + [1] * 2 + [2] * 4):
        design[row] = [1, *{0: (1, 0), 1: (0, 1), 2: (-1, -1)}[task]]
    y = np.concatenate(values)
    solution, squares, *_ = np.linalg.lstsq(design, y, rcond=None)
    error = np.sqrt(squares[0] / 6 * np.linalg.inv(design.T @ design)[0, 0])
    assert found.mean == pytest.approx(solution[0]) and found.pairs == 9
    assert found.half == pytest.approx(error * stats.t.ppf(0.975, 6))


def test_a_cell_of_tuning_has_no_accuracy():
    with pytest.raises(ValueError, match="expected a tested cell"):
        _ = replace(CELL, seed=TUNING, test=None).accuracy
    assert of_method([replace(CELL, seed=TUNING, test=None)], "LoRA") == []


def test_tables():
    some = [
        *cells("LoRA", [0.80, 0.82, 0.84]),
        *cells("random A, frozen", [0.70, 0.72, 0.73]),
        *cells("IPA, frozen", [0.9], study="rank", rank=4),
        *cells("IPA, frozen", [0.5], study="rank", rank=8),
    ]
    found = tables(some)
    assert set(found) == {"toy", "toy_rank"}
    lora, random = found["toy"].splitlines()[2:]
    assert "| 82.0 ± 2.0 | 3 | - | **+10.3 ± 1.4** |" in lora
    assert "| 71.7 ± 1.5 | 3 | **-10.3 ± 1.4** | - |" in random
    assert found["toy_rank"].splitlines()[-1].startswith("| IPA, frozen | 90.0 |")


@pytest.mark.parametrize(
    ("mean", "half", "better", "equal"),
    [
        (2.0, 1.0, "yes", "above"),
        (-2.0, 1.0, "no", "below"),
        (0.5, 2.0, "not shown", "not shown"),
        (0.3, 0.5, "not shown", "yes"),
        (0.5, 0.2, "yes", "yes"),
    ],
)
def test_answers(mean, half, better, equal):
    difference = Difference(mean, half, 3)
    assert claims.answer(difference, equal=False) == better
    assert claims.answer(difference, equal=True) == equal


def test_claims_name_what_was_run():
    some = [*cells("LoRA", [0.80, 0.82, 0.84]), *cells("IPA, frozen", [0.70, 0.72, 0.73])]
    lines = claims.table(claims.CLAIMS, some).splitlines()[2:]
    assert len(lines) == 2  # above LoRA, equal to LoRA
    for line, wanted in zip(lines, ("no", "below"), strict=True):
        assert f"-10.3 ± 1.4 | 3 | {wanted} |" in line
    methods = {c.method for c in (*claims.CLAIMS, *claims.OWN)}
    assert methods | {c.other for c in (*claims.CLAIMS, *claims.OWN)} <= set(METHODS)


def test_methods_are_grouped():
    some = [
        *cells("LoRA", [0.80, 0.82]),
        *cells("random A, frozen", [0.7, 0.8]),
        *cells("natural gradient, frozen", [0.8, 0.9]),
        *cells("IPA centered, frozen", [0.6, 0.7]),
    ]
    found = tables(some)
    assert set(found) == {"toy", "toy_beyond", "toy_learned"}
    assert "natural" not in found["toy"] and "**+10.0 ± 0.0**" in found["toy_beyond"]
    assert COMPARED.keys() | BEYOND.keys() | LEARNED.keys() == METHODS.keys()


def test_chosen_comparison_takes_fresh_seeds_only():
    some = [
        *cells("random A, frozen", [0.5] * 8, task="headlines"),
        *cells("damped gradient, frozen", [0.9] * 5 + [0.51, 0.52, 0.53], task="headlines"),
        *cells("damped gradient, frozen", [0.9] * 8, task="elsewhere"),
        *cells("random A, frozen", [0.5] * 8, task="elsewhere"),
    ]
    (line,) = claims.fresh(some).splitlines()[2:]
    assert "| headlines | +2.0 ± 2.5 | 3 | not shown |" in line


def test_validation_data_choose_the_kind_of_p():
    some = [
        *cells("random A, frozen", [0.5, 0.6, 0.5]),
        *cells("LoRA", [0.6, 0.7, 0.6]),
        # Better on test data, worse on validation data.
        *cells("IPA, frozen", [0.9, 0.9, 0.9]),
        *cells("damped gradient, frozen", [0.6, 0.7, 0.61]),
        *tuned("IPA, frozen", {0.01: [0.7, 0.6], 0.03: [0.5, 0.99]}),
        *tuned("damped gradient, frozen", {0.01: [0.74, 0.76], 0.1: [0.8, 0.1]}),
        *cells("IPA, frozen", [0.9, 0.9], task="not tuned"),
    ]
    random, lora = claims.chosen(some).splitlines()[2:]
    assert "| damped gradient, frozen - random A, frozen | toy | +10.3 ±" in random
    assert "| damped gradient, frozen - LoRA | toy | +0.3 ±" in lora


def test_shares_are_compared_with_all_texts():
    sizes = {2: [0.7, 0.7, 0.7], 20: [0.79, 0.81, 0.80], 2000: [0.80, 0.81, 0.80]}
    some = [
        cell
        for size, values in sizes.items()
        for cell in cells("IPA, frozen", values, study="share", learn_from=size)
    ]
    few, more = claims.shares(some).splitlines()[2:]
    assert "from 2 texts - from 2000" in few and few.endswith("| below |")
    assert "from 20 texts - from 2000" in more and "-0.3 ± 1.4" in more


def test_vision_results_are_cells_too(tmp_path):
    runs = [{"seed": s, "rate": 1e-2, "validation": 0.9, "test": 0.8, "seconds": 1} for s in (0, 1)]
    content = {
        "set": "digits",
        "backbone": "vit",
        "method": "LoRA",
        "rank": 8,
        "trainable": 3,
        "settings": {"epochs": 6},
        "runs": runs,
    }
    (tmp_path / "vit" / "digits").mkdir(parents=True)
    (tmp_path / "vit" / "digits" / "lora.json").write_text(json.dumps(content))
    found = list(vision.read(tmp_path))
    assert [(cell.task, cell.seed, cell.accuracy) for cell in found] == [
        ("digits (vit)", 0, 80.0),
        ("digits (vit)", 1, 80.0),
    ]
    assert {cell.method for cell in vision.read()} <= set(METHODS) | {"head only", "DoRA-style"}


def test_figures_are_the_same_each_time(tmp_path, monkeypatch):
    some = [
        *cells("LoRA", [0.80, 0.82]),
        *cells("IPA, frozen", [0.7, 0.8]),
        *cells("IPA, frozen", [0.6, 0.7], study="rank", rank=4),
        *cells("IPA, frozen", [0.6, 0.7], study="share", learn_from=2),
        *cells("IPA, frozen", [0.6, 0.7], study="share", learn_from=20),
    ]
    curves = {"toy": {"layer 0": 0.9, "layer 1": 0.8}}
    found = {
        "adapters": ["a", "b"],
        **dict.fromkeys(("a", "b", "update"), [[1, 0.5], [0.5, 1]]),
        **dict.fromkeys(("a_before_and_after", "features_before_and_after"), curves),
    }
    results = tmp_path / "results"
    store = Cells(results / "toy.jsonl", "")
    for cell in some:
        store.add(cell)
    (results / "similarity.json").write_text(json.dumps(found))
    monkeypatch.setattr(figures, "FOLDER", results)
    drawn = []
    for name in ("one", "two"):
        monkeypatch.setattr("sys.argv", ["figures", "--out", str(tmp_path / name)])
        assert figures.main() == 0
        drawn.append({path.name: path.read_text() for path in (tmp_path / name).iterdir()})
    assert drawn[0] == drawn[1]
    assert set(drawn[0]) == {
        "methods.svg",
        "rank_and_share.svg",
        "likeness.svg",
        "before_and_after.svg",
    }


def test_every_method_has_a_kind_that_is_known():
    from benchmarks.evidence.projections import KINDS

    kinds = {method.projection for method in METHODS.values()}
    assert kinds - {None, "eva"} == set(KINDS)
