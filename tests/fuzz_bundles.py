"""Load and use mutated bundles in a process that may crash: `python fuzz_bundles.py FOLDER EXAMPLES KIND [KIND]`.

The folder holds the bundle that is at work, and `mutations`, what was done to it.
"""

from __future__ import annotations

import faulthandler
import io
import json
import os
import re
import resource
import shutil
import sys
import warnings
from collections import Counter
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from bundles import DIM, nodes_of, saved, sign, unzipped, zipped
from features.errors import PermafrostError
from pipeline import bundle, records

MOST_MEMORY = 4 * 2**30
"""Bytes beyond what the process has when it starts."""
MOST_SECONDS = 20
FORBIDDEN = (
    *("os.system", "os.exec", "os.spawn", "os.posix_spawn", "os.fork", "os.kill", "os.remove", "os.rename", "os.mkdir"),
    *("os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod", "os.chown", "os.putenv", "pty.", "subprocess."),
    *("socket.", "ctypes.", "pickle.", "shutil.", "tempfile.", "urllib.", "webbrowser."),
)
NAMES = [
    *("os.system", "posix.system", "builtins.eval", "builtins.exec", "builtins.str", "builtins.dict", "builtins.list"),
    *("subprocess.Popen", "numpy.load", "numpy.exp", "numpy.ndarray", "numpy.float64", "joblib.numpy_pickle.load"),
    *("functools.partial", "operator.methodcaller", "sklearn.tree._tree.Tree", "sklearn.pipeline.Pipeline"),
    *("numpy.random._generator.Generator", "sklearn._loss._loss.CyPinballLoss", "..", ""),
    *("sklearn.svm._classes.SVC", "sklearn.neighbors._classification.KNeighborsClassifier"),
]
LOADERS = [
    *("ObjectNode", "FunctionNode", "TypeNode", "MethodNode", "PartialNode", "OperatorFuncNode", "ReduceNode"),
    *("TreeNode", "LossNode", "NdArrayNode", "MaskedArrayNode", "SparseMatrixNode", "BytesNode", "JsonNode"),
    *("CachedNode", "DictNode", "ListNode", "TupleNode", "SetNode", "RandomGeneratorNode", "DTypeNode"),
    *("ConstructorFromReduceNode", "DefaultDictNode", "SliceNode"),
]
VALUES: list[Any] = [
    *(None, True, False, -1, 0, 1, 2, 3, 5, 1000, 2**31, 2**63, -(2**63), 10**12, 10**30, 0.5, 1e38, 1e308, -1e-300),
    *("", "x", "log", "precomputed", "linear", "polars", "pandas", "sigmoid", "/etc/passwd", "\ud800", "a\nb"),
    *([], {}, [[]], [1, 2], {"a": 1}, {"name": "a"}, [None], [{"name": "a", "classes": None}]),
]
TEXTS = [json.dumps(value) for value in VALUES] + ["NaN", "-Infinity", "[" * 100_000, "1" * 5000, "{", ""]
NUMBERS = [-(2**62), -(2**31), -2, -1, 0, 1, 2, 3, 4, 5, 7, 100, 255, 2**16, 2**31 - 1, 2**62]
FLOATS = [0.0, -1.0, 1e-300, 1e30, 1e300, np.inf, -np.inf, np.nan]
SHAPES = ["(100000000000,)", "(3, 4)", "()", "(0,)", "(0, 100000000000)", "(-1, -4)", "(1, 1, 1, 60)", "(2,)", "(60,)"]
TYPES = ["|O", "<f8", "<f4", ">f8", "<i8", "<i4", "|b1", "<U1", "|S0", "|V1000000000", "<c16", "<M8[s]"]

rows = np.random.default_rng(3).normal(size=(6, DIM)).astype(np.float32)
ROWS = np.concatenate([rows, np.zeros((1, DIM), np.float32), rows[:2] * 1e30])
KEYS = [str(place) for place in range(len(ROWS))]

watching = False
seen: list[str] = []
places = st.integers(0, 2**32)
few = st.integers(0, 2**8)


def watch(event: str, told: tuple[Any, ...]) -> None:
    if not watching:
        return
    if event == "open":
        if isinstance(told[2], int) and told[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            seen.append(f"{event} {told}")
    elif event == "import":
        if str(told[0]).split(".")[0] not in KNOWN:
            seen.append(f"{event} {told[0]}")
    elif event == "exec":
        # Modules are executed as they are imported.
        if not str(told[0].co_filename).endswith(".py"):
            seen.append(f"{event} {told[0]}")
    elif event.startswith(FORBIDDEN):
        seen.append(f"{event} {told}"[:300])


def one(data: st.DataObject, choices: Any) -> Any:
    return choices[data.draw(places) % len(choices)]


def bytes_changed(data: st.DataObject, content: bytes) -> bytes:
    start, end = sorted(data.draw(places) % (len(content) + 1) for _ in "se")
    how = data.draw(few) % 4
    if how == 0 or not content:
        return content[:start] + bytes([data.draw(few) % 256]) + content[start + 1 :]
    if how == 1:
        return content[:start]
    return content[:start] + content[end:] if how == 2 else content[:end] + content[start:]


def array_changed(data: st.DataObject, content: bytes) -> bytes:
    """Another value in a cell, or another shape or type in the header."""
    if data.draw(few) % 4 == 0:
        header = content[10:128].decode("latin-1")
        now = str({"descr": one(data, TYPES), "fortran_order": False, "shape": ()}).replace("()", one(data, SHAPES))
        return content[:10] + now.ljust(len(header) - 1)[: len(header) - 1].encode() + b"\n" + content[128:]
    try:
        array = np.load(io.BytesIO(content), allow_pickle=False).copy()
        flat = array.reshape(-1)
        cells = flat[one(data, flat.dtype.names)] if flat.dtype.names else flat
        if data.draw(few) % 4 == 0:
            array = array[: data.draw(few) % (len(array) + 1)]
        else:
            with np.errstate(all="ignore"):
                value = np.array(one(data, FLOATS if cells.dtype.kind == "f" else NUMBERS)).astype(cells.dtype)
            cells[data.draw(places) % len(cells)] = value
    # Not every array has cells, and an earlier mutation may have left none that can be read.
    except Exception:
        return bytes_changed(data, content)
    np.save(made := io.BytesIO(), array, allow_pickle=False)
    return made.getvalue()


def schema_changed(data: st.DataObject, schema: Any) -> None:
    """Another name, value or place for a node."""
    nodes = nodes_of(schema)
    node, other, how = one(data, nodes), one(data, nodes), data.draw(few) % 8
    if how == 0:
        node["__module__"], _, node["__class__"] = one(data, NAMES).rpartition(".")
    elif how == 1:
        node["__loader__"] = one(data, LOADERS)
    elif how == 2:
        key = one(data, ["__class__", "__module__", "__loader__", "__id__", "content", "file", "type", "key_types"])
        node[key] = deepcopy(other.get(key) if data.draw(few) % 2 else one(data, VALUES))
    elif how == 3:
        node.pop(one(data, list(node)))
    elif how == 4:
        twin = deepcopy(other)
        node.clear()
        node.update(twin)
    elif how == 5:
        schema["protocol"] = one(data, [0, 1, 3, True, -1, None, "2"])
    else:
        attributes = [each for each in nodes if each["__loader__"] == "DictNode" and each.get("content")]
        content = one(data, attributes or [{"content": {"": {}}}])["content"]
        if isinstance(content, dict) and isinstance(value := content[one(data, list(content))], dict):
            value.update({"__loader__": "JsonNode", "__class__": "str", "__module__": "builtins"})
            value["content"] = one(data, TEXTS)


def facts_changed(data: st.DataObject, facts: Any) -> None:
    inside = facts
    while isinstance(inside, dict | list) and inside:
        keys = list(inside) if isinstance(inside, dict) else list(range(len(inside)))
        key = one(data, keys)
        if isinstance(inside[key], dict | list) and inside[key] and data.draw(few) % 4:
            inside = inside[key]
            continue
        if data.draw(few) % 4:
            inside[key] = deepcopy(one(data, VALUES))
        else:
            inside.pop(key)
        return


def mutate(data: st.DataObject, folder: Path) -> list[str]:
    """Change a bundle in one or two ways, and sign it more often than not."""
    names = sorted(path.name for path in folder.iterdir())
    done, signed = [], True
    for _ in range(1 + data.draw(few) % 2):
        how = data.draw(few) % 12
        done.append(str(how))
        if how == 0:
            file = folder / one(data, names)
            file.write_bytes(bytes_changed(data, file.read_bytes()))
            signed = bool(data.draw(few) % 4)
        elif how == 1:
            try:
                facts = json.loads((folder / "bundle.json").read_bytes())
                facts_changed(data, facts)
                (folder / "bundle.json").write_text(json.dumps(facts))
            except ValueError:
                done.append("unreadable")
        else:
            try:
                members = unzipped(folder)
                schema = json.loads(members["schema.json"])
            except Exception:
                done.append("unreadable")
                continue
            arrays = [name for name in members if name != "schema.json"]
            if how < 7 and arrays:
                # Trees, labels and counts: what compiled code indexes by.
                indices = [name for name in arrays if re.search(rb"left|'<i[48]'", members[name][:128])]
                name = one(data, indices if indices and data.draw(few) % 2 else arrays)
                members[name] = (bytes_changed if how == 2 else array_changed)(data, members[name])
            elif nodes_of(schema):
                schema_changed(data, schema)
                members["schema.json"] = json.dumps(schema).encode()
            listed = list(members.items())
            if data.draw(few) % 64 == 0:
                listed.append((one(data, list(members)), one(data, list(members.values()))))
            (folder / "head.skops").write_bytes(zipped(listed))
    if signed:
        try:
            sign(folder)
        except Exception:
            done.append("unsigned")
    return done


def outcome(folder: Path) -> str:
    global watching
    watching = True
    try:
        loaded = bundle.load(folder)
        try:
            records.columns(loaded, records.said(loaded, ROWS))
        except PermafrostError:
            return "loads, and cannot predict"
        return "predicts"
    except PermafrostError as error:
        assert len(str(error)) < 1000, str(error)[:1000]
        return "refused"
    finally:
        watching = False
        assert not seen, seen


if __name__ == "__main__":
    folder, count = Path(sys.argv[1]), int(sys.argv[2])
    warnings.simplefilter("ignore")
    made = saved(folder / "sound", *(tuple(kind.split("-")) for kind in sys.argv[3:]))  # type: ignore[arg-type]
    assert outcome(made) == "predicts"
    KNOWN = {name.split(".")[0] for name in sys.modules}
    sys.addaudithook(watch)
    assert outcome(made) == "predicts"
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MOST_MEMORY, used + MOST_MEMORY))
    faulthandler.enable()
    found: Counter[str] = Counter()

    @settings(
        max_examples=count,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def use(data: st.DataObject) -> None:
        shutil.rmtree(folder / "mutated", ignore_errors=True)
        shutil.copytree(made, folder / "mutated")
        done = mutate(data, folder / "mutated")
        (folder / "mutations").write_text(" ".join(done))
        faulthandler.dump_traceback_later(MOST_SECONDS, exit=True)
        found[outcome(folder / "mutated")] += 1
        faulthandler.cancel_dump_traceback_later()

    use()
    print(json.dumps(found))
