from __future__ import annotations

import functools
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from joblib import Parallel, delayed, parallel_config
from numpy.typing import NDArray
from safetensors.torch import save_file
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline

from conftest import colours, searched
from features import backbones, weights
from features.errors import ViewMismatch
from features.forward import Forward
from features.views import TINY_WEIGHTS
from pipeline import readthrough
from pipeline.transformer import BackboneTransformer

DIM = 1280


def test_threads_share_a_backbone_and_embed_an_image_once(
    paths: list[str], tmp_path: Path, forwarded: list[int], loads: list[Any]
) -> None:
    expected = searched(BackboneTransformer()).fit(paths, colours(paths)).cv_results_["mean_test_score"]
    assert len(loads) == 1
    readthrough._loaded.clear(), loads.clear()
    forwarded.clear()
    with parallel_config("threading"):
        search = searched(BackboneTransformer(store=tmp_path / "store"), n_jobs=4).fit(paths, colours(paths))
    assert sum(forwarded) == 24 and len(loads) == 1
    assert np.allclose(search.cv_results_["mean_test_score"], expected)
    assert threading.active_count() < 20


_loaded: list[Any] = []
_forwarded: list[int] = []


def _in_a_worker(transformer: BackboneTransformer, paths: list[str]) -> tuple[int, int, int, NDArray[np.float32]]:
    if not hasattr(backbones.load, "__wrapped__"):
        load, run = backbones.load, Forward.__call__
        backbones.load = functools.wraps(load)(lambda *arguments: _loaded.append(1) or load(*arguments))
        Forward.__call__ = lambda self, images: _forwarded.append(len(images)) or run(self, images)  # type: ignore
    _forwarded.clear()
    clone(transformer).fit(paths).transform(paths)
    embedded = sum(_forwarded)
    embeddings = pickle.loads(pickle.dumps(transformer)).set_params(store=None).transform(paths)
    return os.getpid(), len(_loaded), embedded, embeddings


@pytest.mark.slow
def test_worker_processes_load_once_each_and_embed_an_image_once(
    paths: list[str], tmp_path: Path, permafrost: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    expected = BackboneTransformer().fit_transform(paths)
    stored = BackboneTransformer(store=tmp_path / "store").fit(paths)
    jobs = [delayed(_in_a_worker)(stored, paths[start:] + paths[:start]) for start in (0, 6, 12, 18)]
    done = Parallel(n_jobs=2)(jobs)
    assert os.getpid() not in {pid for pid, *_ in done} and {loads for _, loads, *_ in done} == {1}
    assert sum(embedded for _, _, embedded, _ in done) == len(paths)
    for (*_, embeddings), start in zip(done, (0, 6, 12, 18), strict=True):
        assert np.allclose(embeddings, np.roll(expected, -start, axis=0), rtol=0, atol=1e-5)
    permafrost("verify", tmp_path / "store")
    search = searched(BackboneTransformer(store=tmp_path / "store"), n_jobs=2).fit(paths, colours(paths))
    assert search.best_score_ > 0.9


PICKLED = """
import pickle, sys
import numpy as np
model, images = pickle.load(open("model.pickle", "rb"))
for weights in (None, "moved.safetensors", "changed.safetensors"):
    try:
        if weights:
            model.set_params(images__weights=weights)
        np.save(f"{weights}.npy", model.predict_proba(images))
    except Exception as error:
        print(type(error).__name__, error)
"""


def test_a_pickle_works_in_another_process_and_refuses_other_weights(paths: list[str], tmp_path: Path) -> None:
    tensors = weights.read_file(TINY_WEIGHTS)
    save_file(tensors, tmp_path / "weights.safetensors")
    step = BackboneTransformer(weights=tmp_path / "weights.safetensors", precision="fp32")
    model = Pipeline([("images", step), ("head", LogisticRegression())]).fit(paths, colours(paths))
    expected = model.predict_proba(paths)
    there = tmp_path / "there"
    there.mkdir()
    (there / "model.pickle").write_bytes(pickle.dumps((model, [Path(path).read_bytes() for path in paths])))
    (tmp_path / "weights.safetensors").rename(there / "moved.safetensors")
    tensors["features.0.0.weight"].view(-1)[0] += 1
    save_file(tensors, there / "changed.safetensors")
    environment = os.environ | {"PYTHONPATH": f"{Path(__file__).parents[1]}"}
    command = [sys.executable, "-c", PICKLED]
    said = subprocess.run(command, cwd=there, env=environment, text=True, check=True, stdout=subprocess.PIPE).stdout
    gone, changed = said.splitlines()
    assert gone.startswith("BackboneError weight file") and "cannot be read: No such file" in gone
    assert np.allclose(np.load(there / "moved.safetensors.npy"), expected, atol=1e-5)
    assert changed.startswith(
        "ViewMismatch tiny gives other embeddings here than where this transformer was fitted: weights"
    )
    assert "set_params the same weights, or fit again" in changed and not (there / "changed.safetensors.npy").exists()


def test_parameters_that_change_the_embeddings_need_another_fit(paths: list[str]) -> None:
    transformer = BackboneTransformer().fit(paths).set_params(weights="untrained")
    with pytest.raises(ViewMismatch, match="fit again"):
        transformer.transform(paths)
    assert transformer.fit(paths).transform(paths).shape == (24, DIM)
