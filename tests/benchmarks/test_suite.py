"""The benchmarks' own machinery: floors, the summary, the figure, and a rehearsal of the GPU's."""

import json
import math
import sys

import pytest
import torch
from transformers import BertConfig, BertModel

from benchmarks import gpu, gpu_bundle, gpu_check, gpu_study, growth, record, summary
from benchmarks.evidence import bundle
from benchmarks.floor import Machine, entries, two_products
from benchmarks.timing import interleaved, ratio
from ipa_torch import fit_projectors


def test_floor_is_the_longer_of_operations_and_bytes():
    machine = Machine(operations=100, bytes=10)
    assert machine.seconds(200) == 2
    assert machine.seconds(200, 50) == 5


def test_floor_counts_shared_inputs_once():
    size = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 1}
    model = BertModel(BertConfig(vocab_size=20, num_hidden_layers=1, **size)).encoder
    found = fit_projectors(model, [torch.randn(6, 9, 8)], 2, progress=False)
    assert entries(found) == 6 * 9 * (8 + 8 + 8 + 16)  # query, key and value; three more
    assert two_products(2, 10) == 2 * (2 * 10 * 16)  # 2 x 2 + 8 columns, to a multiple of 16


def test_turns_begin_with_one_that_does_not_count():
    calls = []
    times = interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 2)
    assert calls == ["a", "b"] * 3
    assert [len(values) for values in times.values()] == [2, 2]
    assert ratio({"a": [1, 4, 9], "b": [1, 2, 3]}, "a", "b") == 2


@pytest.mark.parametrize(
    ("value", "target", "met"),
    [(0.9, "0.90", "yes"), (0.91, "0.90", "**no**"), (10, "10+", "yes"), (9.99, "10+", "**no**")],
)
def test_targets_are_the_most_or_with_a_plus_the_least(value, target, met, tmp_path, monkeypatch):
    results = {"value": value, "floors": {"least": 0.5}}
    (tmp_path / "one.json").write_text(json.dumps(results))
    row = summary.Row("one", "measure", target, lambda r: r["value"], "least")
    other = summary.Row("two", "other", target, lambda r: r["value"], "least")
    monkeypatch.setattr(summary, "FOLDER", tmp_path)
    monkeypatch.setattr(summary, "ROWS", [row, other])
    lines = summary.summary(quick=False).splitlines()
    assert (
        lines[2] == f"| measure | {target} | {value} | 0.5 | {met} | `python -m benchmarks.one` |"
    )
    assert "| not measured |  |  |" in lines[3]


def test_summary_shows_the_recorded_results():
    assert summary.summary(quick=False) == (record.FOLDER / "summary.md").read_text()


def test_growth_is_a_slope_and_a_figure(tmp_path):
    found = growth.measure({1: lambda: None, 2: lambda: None}, 1)
    assert found["seconds"].keys() == {"1", "2"} and math.isfinite(found["slope"])
    recorded = json.loads((record.FOLDER / "growth.json").read_text())["growth"]
    with growth.plt.rc_context(growth.STYLE):
        growth.draw(recorded).savefig(tmp_path / "growth.svg", metadata={"Date": None})
    for drawn in (tmp_path / "growth.svg", growth.FIGURE):
        text = drawn.read_text()
        for name, line in recorded.items():
            assert f">{name}<" in text and f"slope {line['slope']:.2f}" in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="would measure the device")
def test_rehearsal_for_the_gpu_measures_every_part(monkeypatch, capsys):
    pytest.importorskip("peft")
    monkeypatch.setattr(sys, "argv", ["gpu", "measure", "--rehearse"])
    gpu.main()
    shown = capsys.readouterr().out
    for part in ("learners", "learning", "training", "floors", "eva_lost", "memory_ratio"):
        assert part in shown


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="would test the device")
def test_rehearsal_for_the_gpu_checks_every_library(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu", "check", "--rehearse"])
    assert gpu.main() == 0
    shown = capsys.readouterr().out
    assert "check torch" in shown and "'passed': 1" in shown
    for part in ("check cupy", "check adapters", "check jax"):
        assert part in shown
    limits = max(tests.limit + gpu_check.GRACE for tests in gpu_check.STEPS.values())
    assert limits <= 120


def test_a_step_for_the_gpu_that_fails_does_not_stop_those_after_it(capsys):
    results = gpu.Results(quick=True, written=False)
    results.add("first", lambda before: before["never written"])
    results.add("second", lambda before: 2)
    assert results.broken == ["first"] and results.values["second"] == 2
    assert "first" not in results.values["ended"]
    assert "never written" in capsys.readouterr().err


def test_a_cut_run_for_the_gpu_goes_on_after_its_last_result(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "FOLDER", tmp_path)
    gpu.Results(quick=True, written=True).add("first", lambda results: 1)
    results = gpu.Results(quick=True, written=True)
    results.add("first", lambda results: pytest.fail("measured twice"))
    results.add("second", lambda results: results["first"] + 1)
    written = json.loads((tmp_path / "gpu_quick.json").read_text())
    assert (written["first"], written["second"]) == (1, 2)
    assert set(written["ended"]) == {"first", "second"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="would study on the device")
def test_rehearsal_for_the_gpu_studies(monkeypatch, capsys):
    pytest.importorskip("peft")
    monkeypatch.setattr(sys, "argv", ["gpu", "study", "--rehearse"])
    assert gpu.main() == 0
    shown = capsys.readouterr().out
    for part in ("'steps': 12", "'graph': 'not captured", "'edge': True", "step 12: "):
        assert part in shown
    assert gpu_study.LIMIT <= 480


@pytest.mark.skipif(torch.cuda.is_available(), reason="would time the device")
def test_rehearsal_for_the_gpu_times_a_step(monkeypatch, capsys):
    pytest.importorskip("peft")
    monkeypatch.setattr(sys, "argv", ["gpu", "study", "--quick", "--rehearse"])
    assert gpu.main() == 0
    assert "'difference': 0.0" in capsys.readouterr().out


def test_a_study_for_the_gpu_without_its_bundle_names_the_command(tmp_path):
    pytest.importorskip("peft")
    with pytest.raises(bundle.BundleError, match=r"run python -m benchmarks\.gpu_bundle \S*absent"):
        gpu_study.run(gpu_bundle.Plan(), tmp_path / "absent", 1.0, lambda value: None)


def test_parts_of_a_step_for_the_gpu_are_kept_until_it_has_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "FOLDER", tmp_path)
    gpu.Results(quick=True, written=True).keep("study", {"step": 80})
    results = gpu.Results(quick=True, written=True)
    assert results.values["study"] == {"step": 80}
    results.add("study", lambda before: {"step": 400})
    results.add("study", lambda before: pytest.fail("ran twice"))
    assert json.loads((tmp_path / "gpu_quick.json").read_text())["study"] == {"step": 400}


def test_checks_for_the_gpu_keep_the_first_failure_of_each_kind():
    report = """<testsuite>
    <testcase classname="a" name="one"><failure message="ValueError: x">first</failure></testcase>
    <testcase classname="a" name="two"><failure message="ValueError: y">second</failure></testcase>
    <testcase classname="a" name="three"><error message="KeyError: z">third</error></testcase>
    <testcase classname="a" name="four"><skipped message="no device"/></testcase>
    <testcase classname="a" name="five"/></testsuite>"""
    found = gpu_check.summarize(report)
    assert (found["passed"], found["failed"], found["skipped"]) == (1, 3, {"no device": 1})
    first = {"ValueError": "a::one\nfirst", "KeyError": "a::three\nthird"}
    assert found["first_of_each_kind"] == first
