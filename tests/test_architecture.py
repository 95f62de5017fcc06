from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted([*ROOT.glob("features/*.py"), *ROOT.glob("pipeline/*.py")])


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found


def imported_at_the_top(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    top = ast.Module([node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)], [])
    return {name for node in top.body for name in _names(node)}


def _names(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name.split(".")[0] for alias in node.names]
    assert isinstance(node, ast.ImportFrom)
    return [str(node.module).split(".")[0]]


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_features_never_looks_back_and_never_sees_scikit_learn(path: Path) -> None:
    forbidden = {"pipeline", "sklearn", "skops"} if path.parent.name == "features" else set()
    assert not imports(path) & forbidden


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_the_pipeline_imports_torch_only_through_features(path: Path) -> None:
    if path.parent.name == "pipeline":
        assert not imports(path) & {"torch", "torchvision"}
    elif path.stem not in ("backbones", "catalogue", "forward", "layers", "tiny", "transforms", "weights"):
        assert not imported_at_the_top(path) & {"torch", "torchvision"}


@pytest.mark.parametrize(
    "program",
    ["import features", "import pipeline", "import pipeline.cli", "from features import extract, info, store"],
)
def test_importing_loads_neither_torch_nor_scikit_learn(program: str) -> None:
    check = f"import sys; {program}; print(sorted({{'torch', 'sklearn'}} & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-c", check], text=True).strip() == "[]"


@pytest.mark.parametrize(("asked", "found"), [(None, "passive"), ("active", "active")])
def test_threads_are_told_how_to_wait_before_torch_is_loaded(
    asked: str | None, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    if asked:
        monkeypatch.setenv("OMP_WAIT_POLICY", asked)
    program = """
import os, sys
class Finder:
    def find_spec(self, name, *_):
        if name == "torch":
            print(os.environ.get("OMP_WAIT_POLICY"))
            os._exit(0)
sys.meta_path.insert(0, Finder())
from pipeline.cli import main
main()
"""
    said = subprocess.check_output([sys.executable, "-uc", program, "backbones"], text=True)
    assert said.strip() == found


def test_help_loads_neither_torch_nor_scikit_learn() -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "pipeline.cli", "--help"], capture_output=True, text=True, check=True
    )
    loaded = {line.rpartition("|")[2].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert "typer" in loaded
    assert not loaded & {"torch", "sklearn", "pandas", "pyarrow"}


def test_no_file_is_long() -> None:
    assert {path.name: lines for path in FILES if (lines := len(path.read_text().splitlines())) > 350} == {}
