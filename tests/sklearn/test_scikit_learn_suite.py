"""scikit-learn's own tests: its estimator checks, and those of IncrementalPCA."""

import os
import re
import sys
from pathlib import Path

import pytest
import sklearn.decomposition
from sklearn.utils.estimator_checks import parametrize_with_checks

from ipa_core import ExactCovariance, IncrementalPCA
from ipa_sklearn import StreamingPCA
from tests import child_process

SUITE = Path(sklearn.decomposition.__file__).parent / "tests" / "test_incremental_pca.py"
REPLACED = {
    "IncrementalPCA": "StreamingPCA",
    "incrementalpca": "streamingpca",
    "from sklearn.decomposition import PCA, StreamingPCA": (
        "from sklearn.decomposition import PCA\nfrom ipa_sklearn import StreamingPCA"
    ),
}


@parametrize_with_checks(
    [
        StreamingPCA(),
        StreamingPCA(1, whiten=True),
        StreamingPCA(0.5),
        StreamingPCA(learner=ExactCovariance),
        StreamingPCA(1, learner=IncrementalPCA),
    ]
)
def test_estimator_checks(estimator, check):
    check(estimator)


def run_tests(folder, *arguments, **environment):
    """Run pytest in a process with an environment of its own; return how many tests passed."""
    settings = folder / "pytest.ini"
    settings.write_text("[pytest]\n", encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-c", settings, "-p", "no:cacheprovider", "-q"]
    done = child_process.run(
        [*map(str, command), *map(str, arguments)],
        cwd=folder,
        env=os.environ
        | {"PYTHONPATH": os.pathsep.join(str(path) for path in sys.path if path)}
        | environment,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    return int(re.search(r"(\d+) passed", done.stdout)[1])


@pytest.mark.slow
def test_estimator_checks_on_other_array_libraries(tmp_path):
    pytest.importorskip("torch")
    # The variable is read when SciPy is imported.
    arguments = [__file__, "-k", "test_estimator_checks and array_api"]
    # Release 1.8 has 25 such checks for this estimator.
    least = 25 if sklearn.__version__.startswith("1.8.") else 30
    assert run_tests(tmp_path, *arguments, SCIPY_ARRAY_API="1") >= least


@pytest.mark.slow
def test_suite_of_incremental_pca_passes_with_the_name_replaced(tmp_path):
    text = SUITE.read_text(encoding="utf-8")
    for name, replacement in REPLACED.items():
        assert name in text
        text = text.replace(name, replacement)
    suite = tmp_path / "test_streaming_pca.py"
    suite.write_text(text, encoding="utf-8")
    functions = re.findall(r"^def test_", text, re.MULTILINE)
    assert run_tests(tmp_path, suite, "-p", "sklearn.conftest") >= len(functions) >= 22
