"""Mutated files raise an error of the library, or give the right content."""

from tests.scale import mutations


def test_no_mutation_loads_other_content():
    outcomes, problems = mutations.main(300, seed=1)
    assert not problems, problems[:5]
    assert sum(outcomes.values()) == 300
    refused = sum(n for (_, outcome), n in outcomes.items() if outcome.startswith("an error"))
    assert refused > 250


def test_a_file_without_a_digest_would_be_found(monkeypatch):
    monkeypatch.setattr(mutations, "KINDS", (mutations.Metadata,))
    monkeypatch.setattr("ipa_hf.adapter_metadata._digest", lambda content: "0")
    _, problems = mutations.main(300)
    assert any("OTHER CONTENT" in problem for problem in problems)
