"""A tiny model on disk, and an adapter that the documented command has written for it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import ipa_hf
from tests.results_file import ResultsFile, results_fixture
from tests.tiny_model import write_model

from .outcome import check_loads, check_trained

HEADER = ["trainer", "case", "version", "A after training", "loads in stock PEFT"]
FIT = "-m ipa_hf fit MODEL texts.jsonl --out adapter --rank 4 --targets q_proj,v_proj"


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents:
            # Warnings of the packages that are called, not of this one.
            item.add_marker(pytest.mark.filterwarnings("ignore"))


class Task:
    """The folder with MODEL, texts and adapter, and what has become of it."""

    def __init__(self, folder: Path, results: ResultsFile) -> None:
        self.folder, self.results = folder, results
        self.adapter = folder / "adapter"
        self.tokenizer = AutoTokenizer.from_pretrained(folder / "MODEL")

    def base(self):
        return AutoModelForCausalLM.from_pretrained(self.folder / "MODEL")

    def documented_model(self):
        return ipa_hf.load_adapter(self.base(), self.adapter, is_trainable=True)

    def check(self, trainer, case, version, result, trained=None, frozen=True):
        check_trained(self.adapter, result, frozen)
        check_loads(self.base(), result, trained)
        unchanged = "equal to the bit" if frozen else "trained, as documented"
        self.results.add(trainer, case, version, unchanged, "yes")


results = results_fixture(ResultsFile("trainers", "make test-trainers", HEADER))


@pytest.fixture(scope="session")
def task(tmp_path_factory, results):
    folder = tmp_path_factory.mktemp("task")
    write_model(folder / "MODEL")
    texts = [json.dumps({"text": "a b c d e f"}), json.dumps({"text": "f a m b c l d"})] * 20
    (folder / "texts.jsonl").write_text("\n".join(texts))
    subprocess.run([sys.executable, *FIT.split()], cwd=folder, check=True)
    return Task(folder, results)
