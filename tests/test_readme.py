from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from conftest import COLOURS, draw
from features import backbones

ROOT = Path(__file__).parents[1]
COMMANDS = [
    "backbones",
    "compact",
    "compare",
    "demo",
    "explore",
    "export",
    "extract",
    "info",
    "predict",
    "similar",
    "sql",
    "train",
    "vacuum",
    "verify",
]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


@pytest.fixture
def workplace(tmp_path: Path, photos: Path) -> Path:
    """A folder with all that the README's commands speak of."""
    import torch

    houses = pd.DataFrame(
        {"house": range(30), "frontal": [f"{n}.png" for n in range(30)], "price": [1e5 + n * 3e3 for n in range(30)]}
    )
    houses["zipcode"] = [85000 + n % 4 for n in range(30)]
    houses.to_csv(tmp_path / "houses.csv", index=False)
    for number in range(30):
        draw(tmp_path / f"{number}.png", (number * 8, 100, 50))
    files = sorted(f"{path.relative_to(photos)}" for path in photos.rglob("*.png"))
    kinds = [file.split("/")[1] for file in files]
    draw(tmp_path / "photo.jpg", COLOURS["red"])
    labels = {"file": files, "kind": kinds, "weight": [1.5 * len(kind) for kind in kinds]}
    pd.DataFrame(labels).to_csv(tmp_path / "labels.csv", index=False)
    model, _ = backbones.build("mobilenet_v2")
    torch.save(model.state_dict(), tmp_path / "mobilenet_v2.pth")
    return tmp_path


def as_the_shell_reads(commands: list[str]) -> list[list[str]]:
    """The arguments of each command."""
    script = "\n".join(["permafrost() { printf '%s\\0' \"$@\"; echo; }", *commands])
    said = subprocess.run(script, shell=True, check=True, capture_output=True, text=True).stdout
    return [line.split("\0")[:-1] for line in said.splitlines()]


def test_every_command_works(workplace: Path, photos: Path, permafrost: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = [line.replace("SOURCE", str(photos)) for block in blocks("bash") for line in block.splitlines()]
    assert all(command.startswith("permafrost ") for command in commands)
    asked = as_the_shell_reads(commands)
    assert len(asked) == len(commands)
    for arguments in asked:
        permafrost(*arguments, cwd=workplace)
    predictions = pd.read_parquet(workplace / "predictions.parquet")
    assert (predictions["prediction"] == predictions["id"].str.split("/").str[1]).all()
    assert set(pd.read_parquet(workplace / "by-path/samples.parquet")["colour"]) == set(COLOURS)
    # As two runs at the same moment may leave it: each embedding twice.
    for part in list(workplace.glob("store/embeddings/*/*.parquet")):
        shutil.copy(part, part.with_name(f"2099{part.name}"))
    assert len(blocks("python")) == 3
    monkeypatch.chdir(workplace)
    for recipe in blocks("python"):
        exec(recipe, left := dict[str, Any]())
        assert len(left["images"]) == 24 and {"id", "label", "embedding"} <= set(left["images"].columns), recipe


def test_the_pipeline_works(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    (program,) = blocks("python pipeline")
    exec(program, left := dict[str, Any]())
    assert left["search"].predict(left["houses"]).shape == (30,)
    assert len(pd.read_parquet(workplace / "houses/embeddings/tiny-V2-penultimate")) == 30


def test_every_exit_code_of_ours_stands_in_the_table() -> None:
    from features import errors

    codes = {kind.exit_code for kind in vars(errors).values() if hasattr(kind, "exit_code")}
    rows = re.findall(r"^\| (\d+(?:, \d+)*) \|", README, re.MULTILINE)
    assert codes <= {int(code) for row in rows for code in row.split(", ")}


def test_every_option_and_command_has_help_text() -> None:
    import typer
    from typer.main import get_command

    from pipeline.cli import app

    commands = get_command(app).commands  # type: ignore[attr-defined]
    assert sorted(commands) == COMMANDS
    for name, command in commands.items():
        assert command.help, name
        assert not [option.name for option in command.params if not getattr(option, "help", None)], name
    assert typer


def test_the_demo_ends_with_what_the_readme_shows(tmp_path: Path, permafrost: Any) -> None:
    done = permafrost("demo", cwd=tmp_path)
    shown = next(block for block in blocks("") if "dummy" in block)

    def without_numbers(text: str) -> str:
        return re.sub(r"\d[\d.,]*", "#", re.sub(r"[ \t]+", " ", text)).replace(" \n", "\n").strip()

    assert without_numbers(done.stdout) == without_numbers(shown)
    assert (tmp_path / "permafrost-demo/bundle/MODEL_CARD.md").is_file()
