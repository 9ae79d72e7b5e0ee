"""vLLM on a CPU serves exported adapters, two in one engine."""

import pytest


@pytest.fixture(scope="module")
def answers(vllm, served, answer):
    return answer(vllm, "run_vllm.py", served.request())


@pytest.mark.parametrize("name", ["base", "plain", "ranks"])
def test_answers_are_those_of_transformers(name, served, answers, results):
    results.compare("vLLM", name, answers, served)
