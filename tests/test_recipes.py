"""The README's recipes for schedulers, run as each scheduler would run them."""

from __future__ import annotations

import configparser
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from features.store import FeatureStore
from test_readme import blocks


def placed(text: str, photos: Path, store: Path) -> str:
    return text.replace("SOURCE", str(photos)).replace("STORE", str(store)).replace("--store store", f"--store {store}")


def run(command: str | list[str], folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        command,
        shell=isinstance(command, str),
        cwd=folder,
        env=os.environ | {"PATH": path} | environment,
        capture_output=True,
        text=True,
        check=True,
    )


def everything_is_listed(store: Path) -> bool:
    listed = FeatureStore.open(str(store)).load()
    return len(listed.ids) == 24 == len(set(listed.ids))


def test_cron(tmp_path: Path, photos: Path) -> None:
    (line,) = blocks("cron")
    schedule = re.match(r"(?:[\d*/,-]+ ){5}", line)
    assert schedule
    # To cron, a bare % ends the line.
    assert not re.search(r"(?<!\\)%", line)
    run(placed(line[schedule.end() :].replace("\\%", "%"), photos, tmp_path / "s"), tmp_path)
    assert everything_is_listed(tmp_path / "s")
    records = [line for line in (tmp_path / "permafrost.log").read_text().splitlines() if line.startswith("{")]
    assert json.loads(records[-1])["listed"] == 24


def test_systemd(tmp_path: Path, photos: Path) -> None:
    units: dict[str, configparser.ConfigParser] = {}
    for kind in ("service", "timer"):
        units[kind] = configparser.ConfigParser(interpolation=None)
        units[kind].optionxform = str  # type: ignore[assignment, method-assign]
        units[kind].read_string(*blocks(f"ini {kind}"))
    if analyze := shutil.which("systemd-analyze"):
        run([analyze, "calendar", units["timer"]["Timer"]["OnCalendar"]], tmp_path)
    run(shlex.split(placed(units["service"]["Service"]["ExecStart"], photos, tmp_path / "s")), tmp_path)
    assert everything_is_listed(tmp_path / "s")


@pytest.mark.slow
def test_kubernetes(tmp_path: Path, photos: Path) -> None:
    job: Any = yaml.safe_load(*blocks("yaml"))["spec"]["jobTemplate"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    for index in range(job["completions"]):
        words = [placed(word, photos, tmp_path / "s") for word in container["command"]]
        run([word.replace("$(JOB_COMPLETION_INDEX)", str(index)) for word in words], tmp_path)
    assert everything_is_listed(tmp_path / "s")


@pytest.mark.slow
def test_slurm(tmp_path: Path, photos: Path) -> None:
    (script,) = blocks("bash slurm")
    found = re.search(r"--array=0-(\d+)", script)
    assert found
    (tmp_path / "job.sh").write_text(placed(script, photos, tmp_path / "s"))
    for task in range(int(found[1]) + 1):
        environment = {"SLURM_ARRAY_TASK_ID": str(task), "SLURM_ARRAY_TASK_COUNT": str(int(found[1]) + 1)}
        run(["bash", "job.sh"], tmp_path, **environment)
    assert everything_is_listed(tmp_path / "s")


@pytest.mark.slow
def test_airflow(tmp_path: Path, photos: Path) -> None:
    """Airflow needs other versions than ours of nearly everything, so it gets an environment of its own."""
    place = tmp_path / "airflow"
    subprocess.run([sys.executable, "-m", "venv", place], check=True)
    packages = ["apache-airflow>=3", "apache-airflow-providers-standard"]
    installed = subprocess.run([place / "bin/pip", "install", "--quiet", *packages], capture_output=True, text=True)
    if installed.returncode:
        pytest.skip(f"Airflow cannot be installed here: {installed.stderr.splitlines()[-1]}")
    (tmp_path / "dags").mkdir()
    (dag,) = blocks("python dag")
    (tmp_path / "dags/permafrost.py").write_text(placed(dag, photos, tmp_path / "s"))
    home = {"AIRFLOW_HOME": str(tmp_path / "home"), "AIRFLOW__CORE__DAGS_FOLDER": str(tmp_path / "dags")}
    airflow = str(place / "bin/airflow")
    run([airflow, "db", "migrate"], tmp_path, AIRFLOW__CORE__LOAD_EXAMPLES="False", **home)
    run([airflow, "dags", "test", "permafrost", "2026-01-02"], tmp_path, AIRFLOW__CORE__LOAD_EXAMPLES="False", **home)
    assert everything_is_listed(tmp_path / "s")
