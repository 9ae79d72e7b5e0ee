"""Held-out text by its likelihood: the task, methods, plans of training, tables."""

from dataclasses import replace
from functools import partial

import pytest
import torch
import transformers
from torch.nn import functional

from benchmarks import likelihood, likelihood_cost
from benchmarks.evidence import captured, figures, likelihood_curves, likelihood_tables
from benchmarks.evidence.captured import capture, choose
from benchmarks.evidence.cells import Cell, Cells, read
from benchmarks.evidence.corpora import Corpus
from benchmarks.evidence.likelihood_methods import LIKELIHOOD
from benchmarks.evidence.likelihood_task import LikelihoodTask
from benchmarks.evidence.methods import Adapter
from benchmarks.evidence.projections import Sample, damped, inputs
from benchmarks.evidence.similarity import pairs_of
from benchmarks.evidence.task import Settings, sample
from benchmarks.evidence.training import Plan, begin_b, train
from ipa_torch.extension import energy_scale
from tests.benchmarks import evidence_models as tiny

SETTINGS = Settings(rank=2, steps=30, batch_size=8, learn_from=32)


def corpus(name, count):
    return Corpus(name, tuple(("it was", text) for text, _ in tiny.rows(count)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.llama(tmp_path_factory.mktemp("llama"))


def make_task(folder, **options):
    sizes = {"sizes": (90, 20, 30), "dtype": torch.float32, "adapted": 2}
    texts = corpus("toy", 160), corpus("other", 160)
    return LikelihoodTask(*texts, folder=folder, **(sizes | options))


@pytest.fixture(scope="module")
def task(folder):
    return make_task(folder)


@pytest.fixture(scope="module")
def adapter(task):
    return Adapter(task, SETTINGS)


@pytest.fixture
def some(task):
    return Sample(task.fresh(0), sample(task.training(0), 8, 32, 0), task.loss, rank=2, seed=0)


def whole_model_nats(folder, pairs, vocabulary):
    """The same without a cut, padding, batches or places in a smaller vocabulary."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    losses = []
    for instruction, text in pairs:
        prompt = tokenizer(f"{instruction}\n")["input_ids"]
        ids = torch.tensor([*prompt, *tokenizer(text)["input_ids"], tokenizer.eos_token_id])
        with torch.no_grad():
            logits = model(ids[None]).logits[0, len(prompt) - 1 : -1]
        hidden = torch.full_like(logits, -torch.inf)
        hidden[:, vocabulary] = logits[:, vocabulary]
        losses.append(functional.cross_entropy(hidden, ids[len(prompt) :], reduction="none"))
    return float(torch.cat(losses).mean())


@pytest.mark.parametrize("full", [False, True])
def test_likelihood_is_the_whole_models(full, folder, tmp_path):
    pairs = corpus("toy", 160).pairs
    for _ in range(2):  # computed, then out of the cache
        task = make_task(folder, full_vocabulary=full, cache=tmp_path)
        vocabulary = torch.arange(len(tiny.VOCABULARY)) if full else task.vocabulary
        found = task.likelihood(task.fresh(0), "test")
        assert found["toy"] == pytest.approx(whole_model_nats(folder, pairs[:30], vocabulary))
        assert found["other"] == pytest.approx(whole_model_nats(folder, pairs[:7], vocabulary))
    assert len(list(tmp_path.iterdir())) == 4
    validated = task.likelihood(task.fresh(0), "validation")
    assert validated == {"toy": pytest.approx(whole_model_nats(folder, pairs[30:50], vocabulary))}


def test_loss_is_the_likelihood(task):
    batch = sample(task.parts["validation"], 20, 20, 0)[0]
    with torch.no_grad():
        loss = float(task.loss(task.fresh(0), batch))
    assert loss == pytest.approx(task.likelihood(task.fresh(0), "validation")["toy"], rel=1e-5)


def test_seeds_vary_the_training_texts_only(task):
    first, second = ({id(example) for example in task.training(seed)} for seed in (0, 1))
    assert len(first) == len(second) == 60 and first != second
    assert not first & {
        id(example) for part in ("validation", "test") for example in task.parts[part]
    }


def test_too_few_texts():
    with pytest.raises(ValueError, match="expected 200 texts of toy, got 160"):
        corpus("toy", 160).parts((100, 50, 50))


@pytest.mark.parametrize("name", LIKELIHOOD)
def test_method(name, task, adapter):
    """A method begins as the base model, but for B's first step, and trains what it says."""
    method = LIKELIHOOD[name]
    model, spent = adapter(method, seed=0)
    batch = sample(task.training(0), 8, 8, 0)[0]
    with torch.no_grad():
        before, plain = task.loss(model, batch), task.loss(task.fresh(0), batch)
    assert method.plan.first_step is not None or float(before) == pytest.approx(
        float(plain), rel=1e-5
    )
    start = pairs_of(model.body)
    train(model, task, SETTINGS, 1e-2, 0, spent, plan=method.plan)
    end = pairs_of(model.body)
    moved = any(not torch.equal(start[layer].a, end[layer].a) for layer in start)
    assert moved == method.trainable
    assert any(pair.b.any() for pair in end.values())


def test_capture_is_of_the_rows_that_are_there(some, task):
    name = "layers.1.mlp.down_proj"
    rows = capture(some, gradients=True)[name]
    lengths = [int(batch["attention_mask"].sum()) for batch in some.batches]
    assert rows.x.shape == (sum(lengths), 32) and rows.g.shape == (sum(lengths), 16)
    assert int(rows.first.sum()) == sum(len(batch["labels"]) for batch in some.batches)
    layer = some.model.body.get_submodule(name)
    layer.weight.requires_grad_(True)
    for batch in some.batches:
        task.loss(some.model, batch).backward()
    torch.testing.assert_close(rows.g.T @ rows.x, layer.weight.grad.double(), atol=1e-6, rtol=1e-4)


def test_rows_of_inputs_are_those_of_ipa(some):
    """A learned from captured rows is what `fit_projectors` and the energy scale give."""
    projectors = inputs(some)
    for name, a in choose(some, captured.inputs, gradients=False).items():
        expected = energy_scale(projectors[name]) * torch.as_tensor(projectors[name].components)
        torch.testing.assert_close(a.T @ a, expected.T @ expected, atol=1e-4, rtol=1e-3)


def test_damped_rows_are_those_of_the_study_before(some):
    projectors = damped(some)
    for name, a in choose(some, captured.damped, gradients=True).items():
        rows = torch.as_tensor(projectors[name].components)
        assert (a @ rows.T).norm() == pytest.approx(float(a.norm()), rel=1e-3)


@pytest.mark.parametrize(("beta", "end"), [(0.0, captured.damped), (1e6, captured.inputs)])
def test_ends_of_the_criterion(beta, end, some):
    rule = partial(captured.mixed, beta=beta, weighting=captured.every)
    expected = choose(some, end, gradients=True, scaling=1.0)
    for name, a in choose(some, rule, gradients=True, scaling=1.0).items():
        other = expected[name]
        torch.testing.assert_close(a.T @ a, other.T @ other, atol=1e-3, rtol=1e-2)


def test_long_rows_have_length_one(adapter):
    model, _ = adapter(LIKELIHOOD["IPA without first token, long rows, trainable"], seed=0)
    for pair in pairs_of(model.body).values():
        assert pair.a.norm(dim=1).tolist() == pytest.approx([1, 1], rel=1e-4)


def test_eva_of_equal_ranks(adapter):
    model, _ = adapter(LIKELIHOOD["EVA, equal ranks"], seed=0)
    assert {len(pair.a) for pair in pairs_of(model.body).values()} == {2}
    spread, _ = adapter(LIKELIHOOD["EVA"], seed=0)
    rhos = [x.body.peft_config["default"].eva_config.rho for x in (model, spread)]
    assert rhos == [1.0, 2.0]


@pytest.mark.parametrize("kind", ["gradient", "sign"])
def test_b_begins_at_a_step_that_helps(kind, task, adapter, some):
    model, _ = adapter(LIKELIHOOD["IPA, frozen"], seed=0)
    before = float(task.loss(model, some.batches[0]).detach())
    length = begin_b(model, task.loss, some.batches, kind)
    assert length > 0
    assert float(task.loss(model, some.batches[0]).detach()) < before
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())
    fresh, _ = adapter(LIKELIHOOD["IPA, frozen"], seed=0)
    for batch in some.batches:
        (task.loss(fresh, batch) / len(some.batches)).backward()
    found = {n: p.grad for n, p in fresh.named_parameters() if "lora_B" in n}
    for name, p in model.named_parameters():
        if name in found:
            step = found[name] if kind == "gradient" else found[name].sign()
            torch.testing.assert_close(p.detach(), -length * step)


def test_b_stays_where_no_step_helps(adapter):
    model, _ = adapter(LIKELIHOOD["IPA, frozen"], seed=0)

    def loss(model, batch):  # at its minimum, but with a slope
        b = torch.cat([p.flatten() for n, p in model.named_parameters() if "lora_B" in n])
        return 1 + b.abs().sum() + (b * torch.linspace(-0.5, 0.5, len(b))).sum()

    assert begin_b(model, loss, [{}], "gradient") == 0
    assert not any(p.any() for n, p in model.named_parameters() if "lora_B" in n)


@pytest.mark.parametrize(
    ("plan", "moves"),
    [(Plan(held_after=0.5), True), (Plan(held_after=0.0), False), (Plan(rate_of_a=0.0), False)],
)
def test_plans_of_a(plan, moves, task, adapter):
    model, _ = adapter(LIKELIHOOD["LoRA"], seed=0)
    before = pairs_of(model.body)
    train(model, task, SETTINGS, 1e-2, 0, 0.0, plan=plan)
    after = pairs_of(model.body)
    assert any(not torch.equal(before[n].a, after[n].a) for n in before) == moves


def test_held_a_moves_no_more(task, adapter):
    """Training on after A is held is training B alone."""
    found = []
    for share in (0.1, 1.0):
        model, _ = adapter(LIKELIHOOD["LoRA"], seed=0)
        before = pairs_of(model.body)
        train(model, task, SETTINGS, 1e-2, 0, 0.0, plan=Plan(held_after=share))
        after = pairs_of(model.body)
        found.append(sum(float((after[n].a - before[n].a).norm()) for n in before))
    assert found[0] < 0.3 * found[1]


def test_lorafa_of_orthonormal_rows_is_adam(task, adapter):
    """(A A^T)^-1 is a number then, and Adam does not see numbers."""
    found = []
    for optimizer in ("adam", "lorafa"):
        model, _ = adapter(LIKELIHOOD["IPA, frozen"], seed=0)
        train(model, task, SETTINGS, 1e-2, 0, 0.0, plan=Plan(optimizer=optimizer))
        found.append(task.likelihood(model, "validation")["toy"])
    assert found[0] == pytest.approx(found[1], abs=2e-3)


def test_study_takes_the_rate_of_least_nats(task, tmp_path):
    cells = Cells(tmp_path / "cells.jsonl", "test")
    study = likelihood.LikelihoodStudy("likelihood", task, SETTINGS, cells, methods=LIKELIHOOD)
    study.run(["LoRA"], range(2))
    known = list(read(tmp_path / "cells.jsonl"))
    tuned = [cell for cell in known if cell.test is None]
    best = min(tuned, key=lambda cell: cell.validation["toy"])
    tested = [cell for cell in known if cell.test is not None]
    assert {cell.rate for cell in tested} == {best.rate}
    assert [set(cell.test) for cell in tested] == [{"toy", "other"}] * 2


def test_rates_are_those_of_the_kind_or_of_the_choosing_one(task, tmp_path):
    cells = Cells(tmp_path / "cells.jsonl", "test")
    study = likelihood.LikelihoodStudy("likelihood", task, SETTINGS, cells, methods=LIKELIHOOD)
    likelihood.tune(study, ["LoRA"], [1e-4, 1e-3, 1e-2])
    found = [
        replace(cell, task="headlines", validation={"headlines": cell.validation["toy"]})
        for cell in read(tmp_path / "cells.jsonl")
    ]
    assert len(found) == 3 and all(cell.test is None for cell in found)
    best = min(found, key=lambda cell: cell.validation["headlines"])
    rates = likelihood.known_rate
    assert rates(found, "toy", "LoRA", SETTINGS) == best.rate
    other = [
        replace(cell, task="toy", validation={"toy": -cell.validation["headlines"]})
        for cell in found
    ]
    worst = max(found, key=lambda cell: cell.validation["headlines"])
    assert rates([*found, *other], "toy", "LoRA", SETTINGS) == worst.rate != best.rate
    assert rates([*found, *other[:2]], "toy", "LoRA", SETTINGS) == best.rate
    with pytest.raises(ValueError, match="expected three rates of .*; tune it first"):
        rates(found, "toy", "EVA", SETTINGS)


def test_cost_of_steps(task):
    found = likelihood_cost.cost(task, (1, 8), rounds=2)
    trained = {name: values["trained"] for name, values in found.items()}
    assert trained["LoRA, rank 8"] == 8 * trained["LoRA, rank 1"]
    for rank in (1, 8):
        frozen, lora = (found[f"{name}, rank {rank}"] for name in ("random A, frozen", "LoRA"))
        assert frozen["trained"] < lora["trained"] and frozen["MiB"] < lora["MiB"]
        upper = found[f"LoRA, upper half of the blocks, rank {rank}"]
        assert 2 * upper["trained"] == lora["trained"] and upper["MiB"] < lora["MiB"]
    assert found["LoRA, rank 8"]["time"] == 1


def test_tables_of_likelihood(monkeypatch):
    """Differences are paired by seed, bold if the interval excludes zero; the gap is shared out."""
    base = {"LoRA": 5.0, "random A, frozen": 5.1, "IPA without first token, frozen": 5.04}
    noise = {"LoRA": 0.0, "random A, frozen": 0.001, "IPA without first token, frozen": -0.001}

    def cell(method, seed, test):
        return Cell(
            "likelihood", "headlines", method, 8, 80, 128, seed, 0.1, {"headlines": 6.0 - seed},
            test, 4.0, 1234, 1.0, 1.0, 1.0,
        )  # fmt: skip

    cells = [
        cell(name, seed, {"headlines": nats + seed + seed * noise[name], "reviews": 4.5})
        for name, nats in base.items()
        for seed in range(3)
    ]
    found = likelihood_tables.tables([*cells, cell("LoRA", 100, None)])
    line = found["headlines"].splitlines()[-1]
    assert line.startswith("| IPA without first token, frozen | 1,234 | 6.039 ± 0.999 | 3 |")
    assert "| **+0.039 ± 0.002** | **-0.062 ± 0.005** | 61 % | 4.500 ± 0.000 | 0.1 | 4 |" in line
    assert "frozen - LoRA | **+0.039 ± 0.002** |" in found["differences"]
    lines = found["resolved"].splitlines()[2:]
    assert [line.partition(" |")[0] for line in lines] == [
        "| random A, frozen - LoRA",
        "| IPA without first token, frozen - LoRA",
        "| IPA without first token, frozen - random A, frozen",
    ]
    assert "| +0.039 ± 0.002 |" in lines[1]
    monkeypatch.setattr(likelihood_tables, "LEAST", 0.05)
    lines = likelihood_tables.tables(cells)["resolved"].splitlines()[2:]
    assert "| IPA without first token, frozen - LoRA" not in "".join(lines) and len(lines) == 2
    assert found["validation"].splitlines()[-1] == "| LoRA | -94.000 at 0.1 |"
    with pytest.raises(ValueError, match="expected a tested cell, got one of tuning"):
        likelihood_tables.nats(cell("LoRA", 100, None))
    assert figures.likelihood(likelihood_tables.tested_cells(cells)).axes


def test_table_and_figure_of_curves():
    """Steps or rank are varied, not both; LoRA and random A are those of the same settings."""
    base = {"LoRA": 5.0, "random A, frozen": 5.1, "IPA without first token, frozen": 5.04}

    def cell(method, seed, rank=8, steps=80, rate=0.1, tuned=None):
        nats = base.get(method, 4.0) - rank / 100 - steps / 1000 + seed
        tested = None if tuned else {"headlines": nats, "reviews": 4.5}
        return Cell(
            "likelihood", "headlines", method, rank, steps, 128, seed, rate,
            {"headlines": tuned or 6.0}, tested, 4.0, 100 * rank, 1.0, 1.0, 1.0,
        )  # fmt: skip

    settings = [{}, {"rank": 2}, {"steps": 150}, {"rank": 2, "steps": 150}]
    cells = [cell(name, seed, **some) for name in base for seed in (0, 1) for some in settings]
    others = [cell("EVA", 0), replace(cell("LoRA", 5), task="reviews", test={"reviews": 4.0})]
    lines = likelihood_curves.table([*cells, *others]).splitlines()[2:]
    found = [line.strip("| ").split(" | ") for line in lines]
    assert [row[:2] for row in found[::3]] == [["80", "2"], ["80", "8"], ["150", "8"]]
    assert [row[2] for row in found] == [*likelihood_curves.METHODS] * 3
    assert lines[2] == (
        "| 80 | 2 | IPA without first token, frozen | 200 | 0.1 | 5.440 ± 0.707 | 2 "
        "| **+0.040 ± 0.000** | **-0.060 ± 0.000** | 60 % |"
    )
    drawn = figures.likelihood_curves(likelihood_curves.curve_cells([*cells, *others]))
    assert [len(place.get_legend().get_texts()) for place in drawn.axes] == [3, 3]
    assert [line.get_xdata().tolist() for line in drawn.axes[1].lines[:1]] == [[200, 800]]
    tuned = [cell("LoRA", 100, steps=150, rate=rate, tuned=9 + rate) for rate in (0.2, 0.3, 0.4)]
    better = [cell("LoRA", seed, steps=150, rate=0.2) for seed in (0, 1)]
    of_150 = likelihood_curves.table([*cells, *tuned, *better]).splitlines()[-3]
    assert of_150.startswith("| 150 | 8 | LoRA | 800 | 0.2 |")


def test_table_of_classification():
    def cell(method, seed, test):
        return Cell(
            "loss", "toy", method, 8, 100, 320, seed, 0.1, {"toy": 1.0},
            test, 4.0, 1234, 1.0, 1.0, 1.0,
        )  # fmt: skip

    nats = {"LoRA": 0.5, "random A, frozen": 0.7, "IPA, frozen": 0.55}
    tested = [
        cell(name, seed, {"toy": value + seed}) for name, value in nats.items() for seed in (0, 1)
    ]
    tuning = [cell("EVA", 100, None)]
    found = likelihood_tables.tables([*tested, *tuning])
    assert list(found) == ["classification"] and "EVA" not in found["classification"]
    line = found["classification"].splitlines()[-1]
    assert line.startswith("| toy | IPA, frozen | 1.050 ± 0.707 | 2 | **+0.050 ± 0.000** |")
    assert line.endswith(" **-0.150 ± 0.000** | 75 % | **-0.050 ± 0.000** | 0.1 |")
    wide = [replace(c, test={"toy": c.test["toy"] + 9 * c.seed}) for c in tested[:2]]
    line = likelihood_tables.tables([*wide, *tested[2:]])["classification"].splitlines()[-1]
    assert " | - | " in line  # no gap is shown, so no share of it


def test_cells_at_the_best_rate_of_their_kind():
    def cell(rate, validation, test):
        return Cell(
            "likelihood", "steps", "LoRA", 8, 80, 128, 0 if test else 100, rate,
            {"steps": validation}, test, 0.0, 1, 1.0, 1.0, 1.0,
        )  # fmt: skip

    tested = [cell(rate, 5.0, {"steps": 5.0, "headlines": 5.0}) for rate in (0.1, 0.01)]
    tuned = [cell(0.1, 5.0, None), cell(0.01, 4.0, None), cell(0.001, 6.0, None)]
    assert likelihood_tables.tested_cells([*tested, *tuned]) == tested[1:]
    assert likelihood_tables.tested_cells(tested[:1]) == tested[:1]
