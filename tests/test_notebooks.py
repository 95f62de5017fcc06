"""The notebooks: that what is kept in them is whole, small and clean, and that they run, with and without real data."""

from __future__ import annotations

import re
from base64 import b64decode
from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode

from notebooks import FOLDER, execute

REAL = {
    "houses": "535 real houses",
    "nightly_and_drift": "800 photographs",
    "quickstart": "1797",
    "views_and_heads": "1,440 real images",
}
"""What a notebook says of the data that its kept output comes from."""
NAMES = list(REAL)
MOST_CELLS = 40
MOST_BYTES = 400_000
MOST_LINES = 40
PATHS = re.compile(r"/(?:work|tmp|root|home|Users|usr|var)/|[A-Z]:\\\\")
PICTURES = re.compile(r"imshow|matshow|display\(|IPython|data:image|thumbnails|atlas|galleries")


def read(name: str) -> NotebookNode:
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def outputs(notebook: NotebookNode) -> list[NotebookNode]:
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def shown(output: NotebookNode) -> str:
    """All of an output that is text."""
    texts = [text for kind, text in output.get("data", {}).items() if kind.startswith("text/")]
    return "\n".join([output.get("text", ""), *texts])


def require_sound(notebook: NotebookNode) -> None:
    """Check that every cell ran, in order and without a complaint, and shows numbers and plots only."""
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert len(notebook.cells) < MOST_CELLS
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    found = outputs(notebook)
    assert not [output for output in found if output.output_type == "error" or output.get("name") == "stderr"]
    kinds = {kind for output in found for kind in output.get("data", {})}
    assert "image/png" in kinds and kinds <= {"image/png", "text/html", "text/plain"}
    for output in found:
        if picture := output.get("data", {}).get("image/png"):
            assert output["data"]["text/plain"].startswith("<Figure size") and b"Matplotlib" in b64decode(picture)
        assert not PATHS.search(shown(output)) and "<img" not in shown(output)
        assert (output.get("text", "") + output.get("data", {}).get("text/plain", "")).count("\n") < MOST_LINES


def test_these_are_all() -> None:
    assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_what_is_kept_is_sound(name: str) -> None:
    notebook = read(name)
    nbformat.validate(notebook)
    require_sound(notebook)
    source = "\n".join(cell.source for cell in notebook.cells)
    assert not PATHS.search(source) and not PICTURES.search(source)
    assert (FOLDER / f"{name}.ipynb").stat().st_size < MOST_BYTES
    for link in re.findall(r"\]\((\w+\.ipynb)\)", source):
        assert (FOLDER / link).is_file()


def require_real(name: str, notebook: NotebookNode) -> None:
    said = "\n".join(map(shown, outputs(notebook)))
    assert REAL[name] in said


@pytest.mark.parametrize("name", NAMES)
def test_what_is_kept_comes_from_real_data(name: str) -> None:
    require_real(name, read(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_it_runs_without_real_data(name: str) -> None:
    before = (FOLDER / f"{name}.ipynb").read_bytes()
    require_sound(execute(FOLDER / f"{name}.ipynb", None))
    assert (FOLDER / f"{name}.ipynb").read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if name != "quickstart"])
def test_it_runs_on_real_data(name: str, testdata: Path) -> None:
    fresh = execute(FOLDER / f"{name}.ipynb", str(testdata))
    require_sound(fresh)
    require_real(name, fresh)
