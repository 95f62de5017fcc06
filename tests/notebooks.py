"""Execute notebooks, from a folder of its own each; ``python tests/notebooks.py`` does so in place (`make notebooks`).

What is kept in the repository comes from real data, so that takes ``PERMAFROST_TESTDATA``.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

FOLDER = Path(__file__).parents[1] / "notebooks"
TIMEOUT = 900


def execute(path: Path, data: str | None) -> NotebookNode:
    """A notebook as it is after all of its cells have run, without what differs from run to run."""
    notebook = nbformat.read(path, as_version=4)
    environment = {name: value for name, value in os.environ.items() if name != "PERMAFROST_TESTDATA"}
    environment |= {"PYTHONPATH": str(FOLDER.parent), "OMP_WAIT_POLICY": "passive"}
    environment |= {"PERMAFROST_TESTDATA": data} if data else {}
    # Whatever would be fetched is an error.
    environment |= dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), "http://127.0.0.1:9")
    with tempfile.TemporaryDirectory() as work:
        # What a notebook leaves in a temporary folder goes with this one; no weights or settings lie elsewhere.
        environment |= {"TMPDIR": work, "TORCH_HOME": work, "IPYTHONDIR": work}
        client = NotebookClient(
            notebook, timeout=TIMEOUT, kernel_name="python3", record_timing=False, coalesce_streams=True
        )
        client.execute(cwd=work, env=environment)
    for cell in notebook.cells:
        cell.metadata = NotebookNode()
    notebook.metadata = NotebookNode(
        kernelspec={"display_name": "Python 3", "language": "python", "name": "python3"},
        language_info={"name": "python"},
    )
    return notebook


if __name__ == "__main__":
    data = os.environ.get("PERMAFROST_TESTDATA")
    if not data:
        sys.exit("PERMAFROST_TESTDATA must name the folder of real data: the outputs that are kept come from it")
    for name in sys.argv[1:] or sorted(path.stem for path in FOLDER.glob("*.ipynb")):
        path = FOLDER / f"{name}.ipynb"
        nbformat.write(execute(path, str(Path(data).resolve())), path)
        print(path.name, flush=True)
