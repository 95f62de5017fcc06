"""A trained head as files that can be read and audited before anything in them runs."""

from __future__ import annotations

import hashlib
import io
import json
import tempfile
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import joblib
import numpy as np
from numpy.typing import NDArray

from features.errors import BundleError, DataError
from features.guards import require_folder
from features.views import View
from pipeline.audit import TRUSTED, audit, in_short, require_array
from pipeline.soundness import require_answers, require_sound

FORMAT = 2
"""Of `bundle.json` and the files beside it. Raise it when an older reader would misread one; keep reading the older
ones, and keep a bundle of each in the tests."""
MOST_DIM = 2**24
"""Size of an embedding: a bundle of more numbers would be tried on more memory than there is."""


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
    require_folder(out.parent)


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
    # It imports torch where that is installed, which takes 0.5 GB that training may need.
    import skops.io

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
    """Read a bundle, checking what it is before anything in it is built, and what was built before it predicts.

    Parameters
    ----------
    path : pathlib.Path

    Returns
    -------
    Bundle

    Raises
    ------
    BundleError
        If it is no bundle, of a newer format, changed, its head holds a type that is not in `pipeline.audit.TYPES`, or
        its parts do not fit each other.

    Examples
    --------
    >>> bundle = load(Path("bundle"))
    >>> list(bundle.heads), bundle.view.dim
    (['label'], 1280)
    >>> load(Path("photos"))
    Traceback (most recent call last):
    features.errors.BundleError: photos is not a bundle (it has no bundle.json); `permafrost train` makes one
    """
    import skops.io

    facts = _read_facts(path)
    if facts.get("sha256") != _digest(facts):
        raise BundleError(f"bundle {path} was changed: bundle.json is not what was saved")
    contents = {}
    for name, digest in facts["files"].items():
        # A name that leads elsewhere is nobody's bundle.
        content = _read(path / name) if Path(name).name == name else None
        if content is None:
            raise BundleError(f"bundle {path} is incomplete: it has no {name}")
        if hashlib.sha256(content).hexdigest() != digest:
            raise BundleError(f"bundle {path} was changed: {name} is not the file that was saved")
        contents[name] = content
    if "head.skops" not in contents:
        raise BundleError(f"bundle {path} is incomplete: it has no head.skops")
    try:
        heads = skops.io.loads(audit(contents["head.skops"], path), trusted=TRUSTED)
        if facts["format"] == 1:
            # There was one target, and its head was the file.
            facts = facts | {"targets": [{"name": facts["target"], "classes": facts["classes"]}]}
            heads = {facts["target"]: heads}
        names = [target["name"] for target in facts["targets"]]
        if not isinstance(heads, dict) or list(heads) != names:
            raise BundleError(f"{path}/head.skops does not hold the heads for {', '.join(names)}")
        found = Bundle(heads, facts, _embeddings(contents.get("reference.npy")))
        _require_fitting(found)
    except BundleError:
        raise
    # Whatever skops and scikit-learn stumble over in a head that was tampered with.
    except Exception as error:
        raise BundleError(f"bundle {path} cannot be loaded: {in_short(error)}") from None
    return found


def _require_fitting(found: Bundle) -> None:
    """Check what `bundle.json` says by what the heads and the reference embeddings are."""
    view, known = found.view, found.reference
    asked = asdict(view.request)
    if type(view.dim) is not int or not 0 < view.dim <= MOST_DIM or not isinstance(view.spec, dict):
        raise ValueError("its view is none")
    if not all(isinstance(value, str) or (name, value) == ("weights_sha256", None) for name, value in asked.items()):
        raise ValueError("what its view was made by is no text")
    if known is not None and known.shape[1] != view.dim:
        raise ValueError(f"its reference embeddings are not of {view.dim} numbers")
    X = np.zeros((2, view.dim), np.float32) if known is None else known[[0, -1]]
    for target in found.facts["targets"]:
        head = found.heads[target["name"]]
        require_sound(head, view.dim)
        require_answers(head, target["classes"], X)
        conformal = target.get("conformal")
        if conformal is not None:
            if type(conformal["threshold"]) not in (int, float):
                raise ValueError("its threshold is no number")
            if target["classes"] is None and type(target["log"]) is not bool:
                raise ValueError("it does not say what its ranges are of")


def _embeddings(content: bytes | None) -> NDArray[np.float32] | None:
    if content is None:
        return None
    require_array(content)
    found = np.load(io.BytesIO(content), allow_pickle=False)
    if found.dtype != np.float32 or found.ndim != 2 or not len(found) or not np.isfinite(found).all():
        raise ValueError("reference.npy holds no embeddings")
    return np.asarray(found)


def _read(file: Path) -> bytes | None:
    """Content of a file, or None if there is none: a pipe in its place would be read for ever."""
    try:
        return file.read_bytes() if file.is_file() else None
    except OSError as error:
        raise BundleError(f"{file} cannot be read: {error.strerror}") from None
    except MemoryError:
        raise BundleError(f"{file} is larger than memory") from None


def _read_facts(path: Path) -> dict[str, Any]:
    content = _read(path / "bundle.json")
    if content is None:
        raise BundleError(f"{path} is not a bundle (it has no bundle.json); `permafrost train` makes one")
    try:
        facts = json.loads(content, parse_constant=_refuse)
    except (ValueError, RecursionError):
        raise BundleError(f"{path}/bundle.json is damaged: not JSON") from None
    if not isinstance(facts, dict) or not isinstance(facts.get("files"), dict) or type(facts.get("format")) is not int:
        raise BundleError(f"{path}/bundle.json is not a bundle's")
    if facts["format"] > FORMAT:
        raise BundleError(
            f"bundle {path} has format {facts['format']}, this permafrost reads up to {FORMAT}; upgrade permafrost"
        )
    return facts


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def _digest(facts: dict[str, Any]) -> str:
    """SHA-256 (hex) of all else that `bundle.json` says, as canonical JSON."""
    rest = {key: value for key, value in facts.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
