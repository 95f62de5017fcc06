"""A trained head as files that can be read and audited before anything in them runs."""

from __future__ import annotations

import hashlib
import io
import json
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import skops.io
from numpy.typing import NDArray

from features.errors import BundleError, DataError
from features.views import View

FORMAT = 2
"""Of `bundle.json` and the files beside it. Raise it when an older reader would misread one; keep reading the older
ones, and keep a bundle of each in the tests."""

# Everything our heads are made of, by the name of skops' loader for it. A bundle with anything else is not ours.
TYPES: dict[str, frozenset[str]] = {
    "FunctionNode": frozenset({"numpy.exp", "numpy.log"}),
    "JsonNode": frozenset({"builtins.str"}),
    "TypeNode": frozenset({"builtins.str"}),
    "DictNode": frozenset({"builtins.dict"}),
    "ListNode": frozenset({"builtins.list"}),
    "TupleNode": frozenset({"builtins.tuple"}),
    "NdArrayNode": frozenset(
        f"numpy.{name}" for name in ("ndarray", "float32", "float64", "int64", "uint64", "bool", "str_")
    ),
    "RandomGeneratorNode": frozenset({"numpy.random._generator.Generator"}),
    "TreeNode": frozenset({"sklearn.tree._tree.Tree"}),
    "LossNode": frozenset(
        f"sklearn._loss._loss.{name}" for name in ("CyHalfBinomialLoss", "CyHalfMultinomialLoss", "CyHalfSquaredError")
    ),
    "ObjectNode": frozenset(
        f"sklearn.{name}"
        for name in (
            "_loss.link.IdentityLink",
            "_loss.link.Interval",
            "_loss.link.LogitLink",
            "_loss.link.MultinomialLogit",
            "_loss.loss.HalfBinomialLoss",
            "_loss.loss.HalfMultinomialLoss",
            "_loss.loss.HalfSquaredError",
            "calibration.CalibratedClassifierCV",
            "calibration._CalibratedClassifier",
            "calibration._SigmoidCalibration",
            "calibration._TemperatureScaling",
            "compose._target.TransformedTargetRegressor",
            "ensemble._forest.RandomForestClassifier",
            "ensemble._forest.RandomForestRegressor",
            "ensemble._hist_gradient_boosting.binning._BinMapper",
            "ensemble._hist_gradient_boosting.gradient_boosting.HistGradientBoostingClassifier",
            "ensemble._hist_gradient_boosting.gradient_boosting.HistGradientBoostingRegressor",
            "ensemble._hist_gradient_boosting.predictor.TreePredictor",
            "linear_model._logistic.LogisticRegression",
            "linear_model._ridge.Ridge",
            "linear_model._ridge.RidgeClassifier",
            "neighbors._classification.KNeighborsClassifier",
            "neighbors._regression.KNeighborsRegressor",
            "pipeline.Pipeline",
            "preprocessing._data.Normalizer",
            "preprocessing._data.StandardScaler",
            "preprocessing._function_transformer.FunctionTransformer",
            "preprocessing._label.LabelBinarizer",
            "preprocessing._label.LabelEncoder",
            "svm._classes.LinearSVC",
            "svm._classes.LinearSVR",
            "svm._classes.SVC",
            "svm._classes.SVR",
            "tree._classes.DecisionTreeClassifier",
            "tree._classes.DecisionTreeRegressor",
        )
    ),
}
# Of these, the ones that skops does not trust by itself.
_TRUSTED = [
    "sklearn.calibration._CalibratedClassifier",
    "sklearn.calibration._SigmoidCalibration",
    "sklearn.calibration._TemperatureScaling",
    "sklearn.tree._tree.Tree",
    "sklearn.ensemble._hist_gradient_boosting.predictor.TreePredictor",
]
_PLACES = frozenset({"__class__", "__module__", "__loader__", "__id__"})


@dataclass(frozen=True)
class Bundle:
    """Trained heads, the view they read, and how they came about.

    Attributes
    ----------
    heads : dict of str to sklearn.pipeline.Pipeline
        By target.
    facts : dict
        The content of `bundle.json`.
    reference : numpy.ndarray or None
        float32, shape (examples, dim): some of the training embeddings; bundles of format 1 have none.
    """

    heads: dict[str, Any]
    facts: dict[str, Any]
    reference: NDArray[np.float32] | None = None

    @property
    def view(self) -> View:
        """The view whose embeddings the head reads."""
        return View.from_json(self.facts["view"])


def require_free(out: Path) -> None:
    """Check, before the work, that a bundle may be written there.

    Raises
    ------
    DataError
        If something other than a bundle is there.
    """
    if out.exists():
        try:
            known = {"bundle.json", *_read_facts(out)["files"]}
        except BundleError:
            raise DataError(f"{out} is there and is no bundle; use another --out") from None
        others = sorted(path.name for path in out.iterdir() if path.name not in known)
        if others:
            raise DataError(f"{out} holds {others[0]} beside a bundle; move it, or use another --out")
    if not out.parent.is_dir():
        raise DataError(f"folder {out.parent} for --out is not there; make it first")


def save(
    out: Path,
    heads: dict[str, Any],
    facts: dict[str, Any],
    pages: dict[str, bytes],
    reference: NDArray[np.float32] | None = None,
    with_joblib: bool = False,
) -> dict[str, Any]:
    """Write a bundle, in the place of an older one if there is one.

    Parameters
    ----------
    out : pathlib.Path
    heads : dict of str to estimator
        By target.
    facts : dict
    pages : dict of str to bytes
        What lies in the bundle for people, by file name.
    reference : numpy.ndarray, optional
        float32, shape (examples, dim).
    with_joblib : bool
        Whether to write the heads for plain scikit-learn too. Nothing here ever reads that file.

    Returns
    -------
    dict
        `facts` with the format and the files' digests, as `bundle.json` has them.
    """
    files = {"head.skops": skops.io.dumps(heads, compression=zipfile.ZIP_DEFLATED), **pages}
    if reference is not None:
        np.save(embeddings := io.BytesIO(), reference, allow_pickle=False)
        files["reference.npy"] = embeddings.getvalue()
    if with_joblib:
        joblib.dump(heads if len(heads) > 1 else next(iter(heads.values())), dumped := io.BytesIO(), compress=3)
        files["head.joblib"] = dumped.getvalue()
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    facts = {"format": FORMAT, **facts, "files": digests}
    facts["sha256"] = _digest(facts)
    files["bundle.json"] = (json.dumps(facts, indent=1, allow_nan=False) + "\n").encode()
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch:
        fresh = Path(scratch, "new")
        fresh.mkdir()
        for name, content in files.items():
            (fresh / name).write_bytes(content)
        old = out.rename(Path(scratch, "old")) if out.exists() else None
        try:
            fresh.rename(out)
        except OSError:
            if old:
                old.rename(out)
            raise
    return facts


def load(path: Path) -> Bundle:
    """Read a bundle, checking what it is before anything in it is built.

    Raises
    ------
    BundleError
        If it is no bundle, of a newer format, changed, or its head holds a type that is not in `TYPES`.
    """
    facts = _read_facts(path)
    if facts.get("sha256") != _digest(facts):
        raise BundleError(f"bundle {path} was changed: bundle.json is not what was saved")
    contents = {}
    for name, digest in facts["files"].items():
        file = path / name
        # A name that leads elsewhere, or a pipe in the place of a file, is nobody's bundle.
        if Path(name).name != name or not file.is_file():
            raise BundleError(f"bundle {path} is incomplete: it has no {name}")
        contents[name] = file.read_bytes()
        if hashlib.sha256(contents[name]).hexdigest() != digest:
            raise BundleError(f"bundle {path} was changed: {name} is not the file that was saved")
    try:
        audit(contents["head.skops"], path)
        heads = skops.io.loads(contents["head.skops"], trusted=_TRUSTED)
        reference = _embeddings(contents.get("reference.npy"))
    except BundleError:
        raise
    # Whatever skops and scikit-learn stumble over in a head that was tampered with.
    except Exception as error:
        raise BundleError(f"bundle {path} cannot be loaded: {type(error).__name__}: {error}") from None
    if facts["format"] == 1:
        # There was one target, and its head was the file.
        facts = facts | {"targets": [{"name": facts["target"], "classes": facts["classes"]}]}
        heads = {facts["target"]: heads}
    names = [target["name"] for target in facts["targets"]]
    if not isinstance(heads, dict) or list(heads) != names:
        raise BundleError(f"{path}/head.skops does not hold the heads for {', '.join(names)}")
    return Bundle(heads, facts, reference)


def _embeddings(content: bytes | None) -> NDArray[np.float32] | None:
    if content is None:
        return None
    found = np.load(io.BytesIO(content), allow_pickle=False)
    if found.dtype != np.float32 or found.ndim != 2:
        raise ValueError("reference.npy holds no embeddings")
    return np.asarray(found)


def _read_facts(path: Path) -> dict[str, Any]:
    try:
        facts = json.loads((path / "bundle.json").read_bytes())
    except OSError:
        raise BundleError(f"{path} is not a bundle (it has no bundle.json); `permafrost train` makes one") from None
    except (ValueError, RecursionError):
        raise BundleError(f"{path}/bundle.json is damaged: not JSON") from None
    if not isinstance(facts, dict) or not isinstance(facts.get("files"), dict) or type(facts.get("format")) is not int:
        raise BundleError(f"{path}/bundle.json is not a bundle's")
    if facts["format"] > FORMAT:
        raise BundleError(
            f"bundle {path} has format {facts['format']}, this permafrost reads up to {FORMAT}; upgrade permafrost"
        )
    return facts


def _digest(facts: dict[str, Any]) -> str:
    """SHA-256 (hex) of all else that `bundle.json` says, as canonical JSON."""
    rest = {key: value for key, value in facts.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def audit(head: bytes, path: Path) -> None:
    """Check every type that a saved head names, without importing any.

    Raises
    ------
    BundleError
        Naming the first type that is not in `TYPES`.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(head)) as archive:
            waiting: list[Any] = [json.loads(archive.read("schema.json"))]
    except (zipfile.BadZipFile, KeyError, ValueError) as error:
        raise BundleError(f"{path}/head.skops is damaged: {error}") from None
    while waiting:
        node = waiting.pop()
        if isinstance(node, list):
            waiting.extend(node)
        elif isinstance(node, dict):
            waiting.extend(node.values())
            if "__loader__" in node or "__class__" in node:
                kind = f"{node.get('__module__')}.{node.get('__class__')}"
                if kind not in TYPES.get(str(node.get("__loader__")), ()):
                    raise BundleError(f"{path}/head.skops holds a {kind}, which no bundle of permafrost's holds")
                if node["__loader__"] == "FunctionNode" and not node.keys() <= _PLACES:
                    # Older protocols of skops look up a function by what else the node says.
                    raise BundleError(
                        f"{path}/head.skops names a function in a way that no bundle of permafrost's does"
                    )
