"""A folder of images becomes a listing: its files, the members of its tar shards, and columns out of their paths."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.compute as pc

from features import locations, samples, tars
from features.errors import SourceError
from features.images import EXTENSIONS

SPLITS = ("train", "val", "valid", "validation", "test")
_SUFFIXES = frozenset(extension.removeprefix(".") for extension in EXTENSIONS)


@dataclass
class Found:
    """Files found below a folder.

    Attributes
    ----------
    names : list of str
        Paths relative to the folder, with ``/``.
    uris : list of str
    versions : list of str or None
    """

    names: list[str] = field(default_factory=list)
    uris: list[str] = field(default_factory=list)
    versions: list[str | None] = field(default_factory=list)

    def add(self, name: str, uri: str, version: str | None) -> None:
        """Add one file."""
        self.names.append(name)
        self.uris.append(uri)
        self.versions.append(version)


def list_folder(location: str, template: str | None) -> pa.Table:
    """List the images below a folder, a local one or a URL.

    Parameters
    ----------
    location : str
    template : str, optional
        Reads columns out of the paths, such as ``{year}/{site}/{name}``. Otherwise the parent folder is the
        ``label``, and a known name above it the ``split``.

    Returns
    -------
    pyarrow.Table
        Columns ``id, uri, version`` and those of the paths.

    Raises
    ------
    SourceError
        If a folder cannot be listed, or the template does not fit.
    """
    local = locations.local_path(location)
    images, shards = _walk(local) if local is not None else _find(location)
    tables = [_table(images, images.names, template)]
    for name, uri, version in zip(shards.names, shards.uris, shards.versions, strict=True):
        tables.append(list_tar(uri, name, version, template))
    try:
        return pa.concat_tables(tables, promote_options="permissive") if len(tables) > 1 else tables[0]
    except pa.ArrowTypeError as error:
        raise SourceError(f"shards of {location} differ in a column's type: {error}; list them one by one") from None


def list_tar(uri: str, name: str, version: str | None, template: str | None = None) -> pa.Table:
    """List the images in a tar shard; see `list_folder`.

    Parameters
    ----------
    uri : str
    name : str
        What the ids begin with; nothing for a shard that is the source itself.
    version : str or None
        Of the shard, and so of all its members.
    template : str, optional
        Fits the paths inside the shard, below the folder of the shard.
    """
    names, uris, columns = tars.members(uri)
    ids = [f"{name}/{member}" if name else member for member in names]
    above = name.rpartition("/")[0]
    inside = [f"{above}/{member}" if above else member for member in names]
    table = _table(Found(ids, uris, [version] * len(ids)), inside, template)
    for key, values in columns.items():
        if key in table.column_names:
            if values.type == pa.string():
                values = pc.coalesce(values, table[key].combine_chunks())
            table = table.drop_columns([key])
        table = table.append_column(key, values)
    return table


def _table(found: Found, paths: list[str], template: str | None) -> pa.Table:
    listed = {
        "id": pa.array(found.names, pa.string()),
        "uri": pa.array(found.uris, pa.string()),
        "version": pa.array(found.versions, pa.string()),
    }
    return pa.table(listed | (_by_template(paths, template) if template else _by_folders(paths)))


def _walk(folder: str) -> tuple[Found, Found]:
    """Images and tar shards by extension, in all folders below; hidden names are passed over.

    Folders that links lead to come last, so that a folder is listed under its own name, and each is listed once.
    """
    images, shards = Found(), Found()
    prefix = len(os.path.join(folder, ""))
    seen: set[tuple[int, int]] = set()
    folders: list[str] = [folder]
    links: list[str] = []
    while folders or links:
        directory = folders.pop() if folders else links.pop()
        try:
            status = os.stat(directory)
            entries = list(os.scandir(directory))
        except OSError as error:
            raise SourceError(f"folder {directory} cannot be listed: {error.strerror}; nothing was published") from None
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        for entry in sorted(entries, key=_name, reverse=True):
            name = entry.name
            if name[0] == ".":
                continue
            if _is_folder(entry):
                (links if entry.is_symlink() else folders).append(entry.path)
                continue
            suffix, path = name.rpartition(".")[2].lower(), entry.path
            found = images if suffix in _SUFFIXES else shards if suffix == "tar" else None
            if found is not None:
                version = locations.version_of_file(entry)
                found.add(locations.as_text(path[prefix:]), locations.as_uri(path), version)
    return images, shards


def _name(entry: os.DirEntry[str]) -> str:
    return entry.name


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # A link to itself; as a file it becomes a row.
        return False


def _find(url: str) -> tuple[Found, Found]:
    """The same below a URL."""
    images, shards = Found(), Found()
    for name, uri, version in locations.find(url):
        if any(part.startswith(".") for part in name.split("/")):
            continue
        suffix = name.rpartition(".")[2].lower()
        found = images if suffix in _SUFFIXES else shards if suffix == "tar" else None
        if found is not None:
            found.add(name, uri, version)
    return images, shards


def _by_folders(paths: list[str]) -> dict[str, pa.Array]:
    """The label from the parent folder, the split from a known name above it."""
    told: dict[str, tuple[str | None, str | None]] = {}
    parents = [path.rpartition("/")[0] for path in paths]
    for parent in set(parents):
        above = parent.split("/") if parent else []
        label = above.pop() if above and above[-1] not in SPLITS else None
        told[parent] = label, next((name for name in reversed(above) if name in SPLITS), None)
    columns = {"label": [told[parent][0] for parent in parents], "split": [told[parent][1] for parent in parents]}
    return {key: pa.array(values, pa.string()) for key, values in columns.items() if any(values)}


def _by_template(paths: list[str], template: str) -> dict[str, pa.Array]:
    fields = re.findall(r"\{([A-Za-z_]\w*)\}", template)
    literal = re.split(r"\{[A-Za-z_]\w*\}", template)
    if not fields or len(set(fields)) < len(fields) or any(mark in text for text in literal for mark in "{}"):
        raise SourceError(f"template {template!r} must name different columns, as in '{{year}}/{{site}}/{{name}}'")
    samples.require_free_names(fields, f"template {template!r}", "use another name")
    pattern = re.escape(literal[0])
    for key, text in zip(fields, literal[1:], strict=True):
        pattern += f"(?P<{key}>[^/]+?){re.escape(text)}"
    # The template may leave the extension out.
    match = re.compile(pattern + r"(\.[^./]+)?").fullmatch
    rows = [match(path) for path in paths]
    unfit = [path for path, row in zip(paths, rows, strict=True) if row is None]
    if unfit:
        raise SourceError(
            f"template {template!r} does not fit {len(unfit)} of {len(paths)} paths, such as {unfit[0]!r}"
        )
    return {key: pa.array([row[key] for row in rows if row], pa.string()) for key in fields}
