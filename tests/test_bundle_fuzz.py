"""Ten thousand mutated bundles: none of them executes anything, hangs or crashes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
KINDS = (
    "logreg-multiclass",
    "logreg-binary-calibrate",
    "ridge-multiclass-calibrate",
    "ridge-regression-log",
    "linear_svm-binary-calibrate",
    "linear_svm-regression",
    "knn-multiclass",
    "knn-regression",
    "tree-binary",
    "tree-regression",
    "rbf_svm-multiclass",
    "rbf_svm-regression-log",
    "random_forest-multiclass-calibrate",
    "random_forest-regression",
    "hist_gradient_boosting-multiclass",
    "hist_gradient_boosting-regression",
    "tree-binary knn-regression",
)
EXAMPLES = 10_000 // len(KINDS) + 1


@pytest.mark.slow
@pytest.mark.parametrize("kinds", KINDS)
def test_mutated_bundles_are_refused_or_predict(kinds: str, tmp_path: Path) -> None:
    """In a process of its own, which ends with a trace where one crashes or takes too long."""
    command = [sys.executable, TESTS / "fuzz_bundles.py", tmp_path, str(EXAMPLES), *kinds.split()]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    left = (tmp_path / "mutations").read_text()
    assert done.returncode == 0, f"mutations {left} in {tmp_path / 'mutated'}: {done.stderr[:3000]}"
    found = json.loads(done.stdout.splitlines()[-1])
    # Hypothesis ends early where it finds no more that are new.
    assert sum(found.values()) >= EXAMPLES
    assert found["refused"] > EXAMPLES / 4 and found["predicts"] > EXAMPLES / 20
