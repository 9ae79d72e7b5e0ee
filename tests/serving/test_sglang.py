"""Exported adapters pass SGLang's loading, and its reference operations give the same outputs.

SGLang needs a GPU. Its code that reads, stacks and multiplies adapters runs from its wheel.
"""

import sys

import pytest


@pytest.fixture(scope="module")
def answers(sglang, served, answer):
    given = answer(sys.executable, "run_sglang.py", served.request(), sglang)
    return given | {"version": sglang.name.split("-")[1]}


@pytest.mark.parametrize("name", ["plain", "ranks"])
def test_its_loader_and_operations_give_the_same_answers(name, served, answers, results):
    results.compare("SGLang's loader", name, answers, served)
