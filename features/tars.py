"""Tar shards as WebDataset writes them: which members are images, where their bytes lie, and what stands beside them.

Members that share a name up to its first dot make one sample: an image, and beside it ``.cls`` (the label), ``.txt``
(a text) and ``.json`` (more columns).
"""

from __future__ import annotations

import json
import tarfile
from typing import Any

import pyarrow as pa

from features import locations, samples
from features.images import EXTENSIONS

BESIDE = {"cls": "label", "txt": "text"}
"""Columns that the members beside an image fill."""


def members(uri: str) -> tuple[list[str], list[str], dict[str, pa.Array]]:
    """List a tar shard; no image is read.

    A shard that is damaged or cut off gives what stands before that place, and itself, which becomes a failed row.

    Parameters
    ----------
    uri : str

    Returns
    -------
    names : list of str
        Names of the images within the shard.
    uris : list of str
        Where their bytes lie, see `features.locations.read`.
    columns : dict of str to pyarrow.Array
        What stands beside them; a JSON key that a listing has itself is preceded by ``json_``.
    """
    names: list[str] = []
    uris: list[str] = []
    keys: list[str] = []
    beside: dict[str, dict[str, Any]] = {}
    with locations.opened(uri) as file:
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    tar.members = []  # type: ignore[attr-defined]  # They are kept otherwise, all of them.
                    name = locations.as_text(member.name.removeprefix("./"))
                    folder, slash, base = name.rpartition("/")
                    stem, _, suffixes = base.partition(".")
                    if not member.isfile() or not stem:
                        continue
                    key, suffix = folder + slash + stem, suffixes.rpartition(".")[2].lower()
                    if f".{suffix}" in EXTENSIONS:
                        names.append(name)
                        keys.append(key)
                        uris.append(f"{uri}#bytes={member.offset_data}-{member.offset_data + member.size - 1}")
                    elif suffix in (*BESIDE, "json") and member.size <= locations.CHUNK:
                        content = tar.extractfile(member)
                        told = content.read().decode("utf-8", "replace") if content else ""
                        beside.setdefault(key, {}).update(_columns(suffix, told))
                file.seek(tar.offset)
                # A shard that is cut off between two members looks as if it ended there, but for the block of zeros.
                whole = file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)
        except (tarfile.TarError, EOFError):
            whole = False
    if not whole:
        names.append(uri.rpartition("/")[2])
        keys.append("")
        uris.append(f"{uri}#bytes=0-{tarfile.BLOCKSIZE - 1}")
    columns = dict.fromkeys(column for key in keys for column in beside.get(key, ()))
    return names, uris, {column: _array([beside.get(key, {}).get(column) for key in keys]) for column in columns}


def _columns(suffix: str, told: str) -> dict[str, Any]:
    if suffix in BESIDE:
        return {BESIDE[suffix]: told.strip()}
    try:
        content = json.loads(told)
    except ValueError:
        return {}
    if not isinstance(content, dict):
        return {}
    return {name if samples.is_free(name) else f"json_{name}": value for name, value in content.items()}


def _array(values: list[Any]) -> pa.Array:
    try:
        return pa.array(values)
    # Values of several types, or nested ones that do not agree.
    except (pa.ArrowException, OverflowError):
        return pa.array([None if value is None else json.dumps(value) for value in values], pa.string())
