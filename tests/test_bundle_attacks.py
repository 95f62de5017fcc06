"""Bundles that are damaged, and bundles made to do harm: refused in one line, and nothing in them runs."""

from __future__ import annotations

import functools
import io
import json
import operator
import os
import pickle
import shutil
import tracemalloc
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pyarrow.parquet as pq
import pytest
import skops.io
from sklearn.decomposition import PCA
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import FunctionTransformer
from skops.io._audit import NODE_TYPE_MAPPING

from bundles import nodes_of, saved, sign, unzipped, zipped
from conftest import Toy
from features.errors import BundleError
from features.extract import extract
from features.sources import list_source
from features.store import FeatureStore
from features.views import Request
from pipeline import bundle, heads
from pipeline.dataset import Selection
from pipeline.train import train

LOGREG = ("logreg", "multiclass", "")
KNN = ("knn", "regression", "")
NODE = {"__class__": "system", "__module__": "os"}


@pytest.fixture
def made(tmp_path: Path) -> Path:
    return saved(tmp_path / "b", LOGREG)


class Evil:
    """Writes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.file}",)


def flipped(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def replaced(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def damage(file: Path) -> None:
        file.unlink()
        make(file)

    return damage


DAMAGE: dict[str, Callable[[Path], object]] = {
    "changed": flipped,
    "emptied": lambda file: file.write_bytes(b""),
    "halved": lambda file: os.truncate(file, file.stat().st_size // 2),
    "longer": lambda file: file.write_bytes(file.read_bytes() + b" x"),
    "missing": Path.unlink,
    "a folder": replaced(Path.mkdir),
    "a pipe": replaced(lambda file: os.mkfifo(file)),
    "a loop": replaced(lambda file: file.symlink_to(file)),
    "a device": replaced(lambda file: file.symlink_to("/dev/zero")),
}


def test_whichever_file_is_damaged_is_told_in_one_line(permafrost: Any, photos: Path, toy: Toy, tmp_path: Path) -> None:
    store = FeatureStore.open_or_new(str(tmp_path / "store"))
    extract(list_source(str(photos)), store, [toy.request])
    train(store, "label", tmp_path / "b", selection=Selection(near_duplicates=False), folds=2)
    names = sorted(path.name for path in (tmp_path / "b").iterdir())
    assert {"bundle.json", "head.skops", "reference.npy"} <= set(names)
    for name in names:
        for what, damage in DAMAGE.items():
            shutil.copytree(tmp_path / "b", tmp_path / "damaged")
            damage(tmp_path / "damaged" / name)
            arguments = ("predict", tmp_path / "damaged", tmp_path / "store", "--out", tmp_path / "p.parquet")
            done = permafrost(*arguments, code=5)
            assert done.stderr.count("\n") == 1 and done.stderr.startswith("permafrost: "), (name, what, done.stderr)
            assert not list(tmp_path.glob("*p.parquet*"))
            shutil.rmtree(tmp_path / "damaged")
    permafrost("predict", tmp_path / "b", tmp_path / "store", "--out", tmp_path / "p.parquet")
    assert pq.read_table(tmp_path / "p.parquet").num_rows == 24
    other = FeatureStore.open_or_new(str(tmp_path / "other"))
    extract(list_source(str(photos)), other, [Request("toy", "V2")], view=toy.request.view_name)
    done = permafrost("predict", tmp_path / "b", tmp_path / "other", "--out", tmp_path / "q.parquet", code=5)
    assert done.stderr.count("\n") == 1 and "weights is 'V2', asked for 'V1'" in done.stderr
    assert not list(tmp_path.glob("*q.parquet*"))


@pytest.mark.parametrize(
    "name", ["../secret", "/etc/passwd", "a/../report.md", "..", ".", "", "\0", "x" * 300, "\ud800"]
)
def test_a_name_that_leads_elsewhere_is_refused(name: str, made: Path) -> None:
    (made.parent / "secret").write_text("x")
    facts = json.loads((made / "bundle.json").read_text())
    facts["files"][name] = "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881"
    facts["sha256"] = bundle._digest(facts)
    (made / "bundle.json").write_text(json.dumps(facts))
    with pytest.raises(BundleError, match=r"incomplete: it has no|cannot be read"):
        bundle.load(made)


def test_what_is_no_bundle_or_of_a_newer_format_says_so(made: Path) -> None:
    with pytest.raises(BundleError, match=r"it has no bundle\.json"):
        bundle.load(made.parent)
    sign(made, format=bundle.FORMAT + 1)
    with pytest.raises(BundleError, match="has format 3, this permafrost reads up to 2"):
        bundle.load(made)


@pytest.mark.parametrize("place", ["head", "joblib", "reference", "member", "numpy archive", "schema"])
def test_a_hidden_pickle_never_runs(place: str, made: Path) -> None:
    evil, members = Evil(made.parent / "ran"), unzipped(made)
    np.save(array := io.BytesIO(), np.array([evil], object), allow_pickle=True)
    np.savez(several := io.BytesIO(), np.array([evil], object), allow_pickle=True)
    joblib.dump(evil, dumped := io.BytesIO())
    hidden = {"member": array.getvalue(), "numpy archive": several.getvalue()}.get(place, pickle.dumps(evil))
    if place in ("head", "joblib"):
        (made / "head.skops").write_bytes(hidden if place == "head" else dumped.getvalue())
    elif place == "reference":
        (made / "reference.npy").write_bytes(array.getvalue())
    else:
        chosen = {"schema.json"} if place == "schema" else members.keys() - {"schema.json"}
        (made / "head.skops").write_bytes(zipped([(n, hidden if n in chosen else c) for n, c in members.items()]))
    with pytest.raises(BundleError):
        bundle.load(sign(made))
    pickle.loads(pickle.dumps(Evil(made.parent / "could_run")))
    assert not (made.parent / "ran").exists() and (made.parent / "could_run").exists()


@pytest.mark.parametrize("loader", sorted({loader for loader, _ in NODE_TYPE_MAPPING} | {"ReduceNode", "nonsense"}))
def test_no_loader_of_skops_leads_to_a_foreign_name(loader: str, made: Path) -> None:
    members, file = unzipped(made), made.parent / "ran"
    text = {
        "__class__": "str",
        "__module__": "builtins",
        "__loader__": "JsonNode",
        "content": json.dumps(f"touch {file}"),
    }
    arguments = {"__class__": "tuple", "__module__": "builtins", "__loader__": "TupleNode", "content": [text]}
    function = NODE | {"__loader__": "FunctionNode"}
    inside = {"func": function, "args": arguments, "kwds": text, "namespace": text, "obj": text, "main": text}
    inside |= {"module_path": "os", "function": "system", "bit_generator": text, "seed_seq": text, "data": text}
    for module, name in (("os", "system"), ("numpy", "load"), ("builtins", "eval"), ("sklearn.svm._classes", "NuSVC")):
        evil = {"__class__": name, "__module__": module, "__loader__": loader, "content": inside, "attrs": arguments}
        evil |= {"__reduce__": {"args": arguments}, "type": "numpy", "file": "schema.json", "key_types": arguments}
        for protocol in (0, 1, 2):
            for hide in (lambda schema, node: schema.update(node), lambda schema, node: schema.update(hidden=node)):
                schema = json.loads(members["schema.json"])
                hide(schema, evil)
                schema["protocol"] = protocol
                content = zipped(list((members | {"schema.json": json.dumps(schema).encode()}).items()))
                (made / "head.skops").write_bytes(content)
                with pytest.raises(BundleError, match=r"which no bundle of permafrost's holds|protocol [01] of skops"):
                    bundle.load(sign(made))
    assert not file.exists()


@pytest.mark.parametrize(
    "foreign",
    [
        FunctionTransformer(np.sqrt),
        Pipeline([("pca", PCA()), ("head", heads.make("tree", "regression"))]),
        PCA(),
        print,
        functools.partial(os.system, "touch ran"),
        operator.methodcaller("system", "touch ran"),
        {"x": {1, 2}},
        b"bytes",
        np.random.RandomState(0),
        np.array([None, "x"], object),
    ],
    ids=str,
)
def test_a_head_of_any_other_type_is_refused_by_name(foreign: Any, made: Path) -> None:
    (made / "head.skops").write_bytes(skops.io.dumps({"a": foreign}))
    with pytest.raises(BundleError, match=r"which no bundle of permafrost's holds|an array is no file"):
        bundle.load(sign(made))


def test_a_function_is_known_by_its_name_alone(made: Path) -> None:
    members = unzipped(made)
    schema = json.loads(members["schema.json"])
    disguised = {"__class__": "exp", "__module__": "numpy", "__loader__": "FunctionNode"}
    schema["content"]["hidden"] = disguised | {"content": {"module_path": "os", "function": "system"}}
    (made / "head.skops").write_bytes(zipped([*(members | {"schema.json": json.dumps(schema).encode()}).items()]))
    with pytest.raises(BundleError, match="names a function in a way that no bundle"):
        bundle.load(sign(made))


def test_what_is_checked_is_what_is_built(made: Path) -> None:
    """Of two members of one name, and of two nodes of one identity, one must not be checked and the other built."""
    members = unzipped(made)
    schema = json.loads(members["schema.json"])
    evil = json.loads(members["schema.json"])
    evil["content"]["a"] = NODE | {"__loader__": "TypeNode"}
    sound, foul = members.pop("schema.json"), json.dumps(evil).encode()
    warnings.simplefilter("ignore", UserWarning)
    for first, second in ((sound, foul), (foul, sound)):
        for other in ("schema.json", "SCHEMA.JSON", "./schema.json"):
            content = zipped([("schema.json", first), (other, second), *members.items()])
            (made / "head.skops").write_bytes(content)
            read = second if other == "schema.json" else first
            if read is foul:
                with pytest.raises(BundleError, match=r"holds a os\.system"):
                    bundle.load(sign(made))
            else:
                assert list(bundle.load(sign(made)).heads) == ["a"]
    for node in nodes_of(schema):
        node["__id__"] = 1
    content = zipped([("schema.json", json.dumps(schema).encode()), *members.items()])
    (made / "head.skops").write_bytes(content)
    assert list(bundle.load(sign(made)).heads) == ["a"]


def test_a_bomb_is_refused_before_it_goes_off(made: Path) -> None:
    members = unzipped(made)
    name, array = next((name, content) for name, content in members.items() if name != "schema.json")
    holder = {"__class__": "list", "__module__": "builtins", "__loader__": "ListNode"}
    mention = {"__class__": "ndarray", "__module__": "numpy", "__loader__": "NdArrayNode"}
    mention |= {"type": "numpy", "file": name}
    # Each holds the last one twice, once in full.
    laughs = holder | {"__id__": 1, "content": []}
    for depth in range(2, 60):
        laughs = holder | {"__id__": depth, "content": [laughs, holder | {"__id__": depth - 1}]}
    often = holder | {"protocol": 2, "content": [mention] * 2000}
    bombs: dict[str, Callable[[], dict[str, bytes]]] = {
        "inflates to more": lambda: {"x.npy": bytes(300 * 2**20)},
        "Unterminated|Expecting value": lambda: {"schema.json": b"["},
        "RecursionError": lambda: {"schema.json": b"[" * 100_000},
        "4300 digits": lambda: {"schema.json": b"1" * 5000},
        "an array of": lambda: {
            name: array.replace(b"'shape': (),", b"'shape': (9999999999,),").replace(
                b"'shape': (4,)", b"'shape': (4999999999,)"
            )
        },
        "names more than": lambda: {name: array + bytes(2**20), "schema.json": json.dumps(often).encode()},
        "KeyError": lambda: {"schema.json": json.dumps(laughs | {"protocol": 2}).encode()},
    }
    for told, bomb in bombs.items():
        (made / "head.skops").write_bytes(zipped(list((members | bomb()).items())))
        sign(made)
        tracemalloc.start()
        with pytest.raises(BundleError, match=told):
            bundle.load(made)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert most < 32 * 2**20, (told, most)
    with zipfile.ZipFile(made / "head.skops", "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("schema.json", members["schema.json"])
    with pytest.raises(BundleError, match="is compressed in a way that no head is"):
        bundle.load(sign(made))
