"""What a saved head names and how large it says it is, checked before anything in it is built."""

from __future__ import annotations

import io
import json
import math
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from features.errors import BundleError

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
TRUSTED = [
    "sklearn.calibration._CalibratedClassifier",
    "sklearn.calibration._SigmoidCalibration",
    "sklearn.calibration._TemperatureScaling",
    "sklearn.tree._tree.Tree",
    "sklearn.ensemble._hist_gradient_boosting.predictor.TreePredictor",
]
# Training alone needs them. One seeds itself with as much work as its state says, and all are compiled code.
_FOR_TRAINING = frozenset({"RandomGeneratorNode", "LossNode"})
_NOTHING = {"__class__": "str", "__module__": "builtins", "__loader__": "JsonNode", "content": "null"}
_PLACES = frozenset({"__class__", "__module__", "__loader__"})
_PROTOCOL = 2
"""Of skops: older ones look types up by what else a node says."""
# Deflate makes a thousand times as much of what it reads, heads of ours at most 60 times: forests of small trees do.
_MOST_INFLATED = 64
_SMALL = 64 * 2**20


def audit(head: bytes, path: Path) -> bytes:
    """Check every type that a saved head names, and the size of every array, without building any.

    Returns
    -------
    bytes
        The same head with nothing in it but what was checked, each thing once: skops reads what `__id__` and double
        members of the archive lead it to.

    Raises
    ------
    BundleError
        Naming the first type that is not in `TYPES`, or what is damaged.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(head)) as archive:
            most = max(_SMALL, _MOST_INFLATED * len(head))
            _require_small(archive.infolist(), most)
            schema = json.loads(archive.read("schema.json"))
            if schema["protocol"] is True or schema["protocol"] != _PROTOCOL:
                raise ValueError(f"protocol {schema['protocol']!r} of skops")
            files, trees = _checked(schema, path)
            # Each mention of a file becomes an array.
            if sum(archive.getinfo(file).file_size for file in files) > most:
                raise ValueError("it names more than it holds")
            sound = io.BytesIO()
            with zipfile.ZipFile(sound, "w") as rewritten:
                rewritten.writestr("schema.json", json.dumps(schema))
                for file in sorted(set(files)):
                    content = archive.read(file)
                    # Of a single number scikit-learn reads a length that is not there.
                    if len(require_array(content)) != 1 and file in trees:
                        raise ValueError("the nodes of a tree are no list")
                    rewritten.writestr(file, content)
    except BundleError:
        raise
    # Archive, JSON and arrays can be broken in more ways than the libraries have one error for.
    except Exception as error:
        raise BundleError(f"{path}/head.skops is damaged: {in_short(error)}") from None
    return sound.getvalue()


def in_short(error: Exception) -> str:
    """An error in at most 200 characters: it may quote what a stranger wrote."""
    return f"{type(error).__name__}: {error}"[:200]


def _require_small(members: list[zipfile.ZipInfo], most: int) -> None:
    if sum(member.file_size for member in members) > most:
        raise ValueError("it inflates to more than any head does")
    for member in members:
        # The dictionary of others may be as large as they like.
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(f"{member.filename!r} is compressed in a way that no head is")


def _checked(schema: Any, path: Path) -> tuple[list[str], set[str]]:
    """Check every node, leave out identities and what is for training alone.

    Returns
    -------
    files : list of str
        As often as they are named.
    trees : set of str
        Those with the nodes of trees.
    """
    files, trees, waiting = list[str](), set[str](), [schema]
    while waiting:
        node = waiting.pop()
        if isinstance(node, dict) and ("__loader__" in node or "__class__" in node):
            loader, kind = node.get("__loader__"), f"{node.get('__module__')}.{node.get('__class__')}"
            if not isinstance(loader, str) or kind not in TYPES.get(loader, ()):
                raise BundleError(f"{path}/head.skops holds a {kind[:200]}, which no bundle of permafrost's holds")
            # A node that shares its identity with another is taken for it, whatever it says; a few that hold each
            # other twice take for ever to walk.
            node.pop("__id__", None)
            if loader == "FunctionNode" and node.keys() != _PLACES:
                # Older protocols of skops look up a function by what else the node says.
                raise BundleError(f"{path}/head.skops names a function in a way that no bundle of permafrost's does")
            if loader in _FOR_TRAINING:
                node.clear()
                node.update(_NOTHING)
            if loader == "TreeNode":
                nodes = node["content"]["content"]["nodes"]
                if nodes["__loader__"] != "NdArrayNode":
                    raise ValueError("the nodes of a tree are no array")
                trees.add(nodes["file"])
            if loader == "NdArrayNode":
                if node.get("type") != "numpy" or not isinstance(node.get("file"), str):
                    raise ValueError("an array is no file")
                files.append(node["file"])
        if isinstance(node, dict | list):
            waiting.extend(node.values() if isinstance(node, dict) else node)
    return files, trees


def require_array(content: bytes) -> tuple[int, ...]:
    """Check that an array is as large as it says, since room is made for it before it is read, and tell its shape."""
    stream = io.BytesIO(content)
    if np.lib.format.read_magic(stream) != (1, 0):
        raise ValueError("an array of another version of NumPy's format")
    shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
    said = math.prod(shape) * dtype.itemsize
    if dtype.hasobject or not dtype.itemsize or min(shape, default=0) < 0 or said != len(content) - stream.tell():
        raise ValueError(f"an array of {shape} {dtype} in {len(content)} bytes")
    return tuple(shape)


@contextmanager
def blamed_on_the_bundle() -> Iterator[None]:
    """Whatever goes wrong in here is about the bundle."""
    try:
        yield
    # Embeddings of a store are sound, so whatever scikit-learn raises is about what the bundle made of them.
    except Exception as error:
        raise BundleError(f"the bundle cannot predict: {in_short(error)}; train it again") from None
