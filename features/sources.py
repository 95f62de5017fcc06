"""Where samples are: a folder of images, or a table with an image column, becomes a listing."""

from __future__ import annotations

import csv
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import unquote_to_bytes

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from features.errors import ImageError, SourceError
from features.images import EXTENSIONS
from features.samples import RESERVED

SPLITS = ("train", "val", "valid", "validation", "test")
IMAGE_COLUMNS = ("image", "file", "path", "filename", "filepath", "file_name", "image_path")


@dataclass(frozen=True)
class Source:
    """A listing and where it comes from.

    Attributes
    ----------
    name : str
        By default the absolute path of the folder or table.
    listing : pyarrow.Table
        Columns ``id, uri, version`` and those of the source's own, sorted by id. ``version`` is null where
        there is no file.
    listed_at : str
        ISO 8601, UTC.
    whole : bool
        Whether the listing is all there is.
    """

    name: str
    listing: pa.Table
    listed_at: str
    whole: bool


def list_source(
    location: str,
    *,
    name: str | None = None,
    image: str | None = None,
    id_column: str | None = None,
    columns: str | None = None,
    limit: int | None = None,
) -> Source:
    """List a source; no image is opened.

    Parameters
    ----------
    location : str
        A folder, or a CSV or Parquet file.
    name : str, optional
        Name of the source in the store.
    image, id_column : str, optional
        Columns of a table that hold the images' paths and the ids. Paths are relative to the table; without an
        id column they are the ids.
    columns : str, optional
        Template that reads columns out of a folder's paths, such as ``{year}/{site}/{name}``.
    limit : int, optional
        Take only the first so many samples by id.

    Raises
    ------
    SourceError
        If there is nothing to list, or the table or the template does not fit.
    """
    listed_at = datetime.now(UTC).isoformat()
    path = Path(os.path.normpath(Path(location).expanduser().absolute()))
    if "://" in location:
        raise SourceError(f"source {location} is a URL; only local folders and tables can be read")
    if path.is_dir():
        if image or id_column:
            raise SourceError(f"{location} is a folder; --image and --id are for tables")
        listing = _list_folder(path, columns)
    elif path.is_file() and path.suffix.lower() in (".csv", ".parquet", ".pq"):
        if columns:
            raise SourceError(f"{location} is a table; --columns is for folders")
        listing = _list_table(path, image, id_column)
    elif path.exists():
        raise SourceError(f"source {location} is neither a folder nor a .csv or .parquet table")
    else:
        raise SourceError(f"source {location} is not there")
    listing = listing.sort_by("id")
    whole = limit is None or limit >= len(listing)
    return Source(name or str(path), listing if whole else listing.slice(0, limit), listed_at, whole)


def read(uri: str) -> bytes:
    """Read one image file.

    Raises
    ------
    ImageError
        With ``missing`` or ``unreadable``.
    """
    path = os.fsdecode(unquote_to_bytes(uri.removeprefix("file://"))) if uri.startswith("file://") else uri
    try:
        # Opening a pipe or a device could wait for ever.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ImageError("unreadable", "not a regular file")
        return Path(path).read_bytes()
    except (FileNotFoundError, ValueError):
        raise ImageError("missing", "no such file") from None
    except OSError as error:
        raise ImageError("unreadable", error.strerror or type(error).__name__) from None


def _version(entry: os.DirEntry[str] | Path) -> str | None:
    try:
        status = entry.stat()
    except (OSError, ValueError):
        return None
    return f"{status.st_size}-{status.st_mtime_ns}"


# Folders


def _list_folder(folder: Path, template: str | None) -> pa.Table:
    prefix = len(os.path.join(folder, ""))
    found = sorted((entry.path[prefix:], entry) for entry in _walk(folder))
    if not found:
        raise SourceError(f"folder {folder} holds no image file ({', '.join(sorted(EXTENSIONS)[:6])} ...)")
    ids = [_text(name) for name, _ in found]
    listed = {
        "id": ids,
        "uri": [_uri(entry.path) for _, entry in found],
        "version": pa.array([_version(entry) for _, entry in found], pa.string()),
    }
    own = _by_template(ids, template) if template else _by_folders(ids)
    return pa.table(listed | {key: pa.array(values, pa.string()) for key, values in own.items()})


def _walk(folder: Path) -> Iterator[os.DirEntry[str]]:
    """Image files by extension, in all folders below; hidden names are passed over.

    Folders that links lead to come last, so that a folder is listed under its own name, and each is listed once.
    """
    seen: set[tuple[int, int]] = set()
    folders: list[str] = [str(folder)]
    links: list[str] = []
    while folders or links:
        directory = folders.pop() if folders else links.pop()
        try:
            status = os.stat(directory)
            entries = sorted(os.scandir(directory), key=lambda entry: entry.name, reverse=True)
        except OSError as error:
            raise SourceError(f"folder {directory} cannot be listed: {error.strerror}") from None
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if _is_folder(entry):
                (links if entry.is_symlink() else folders).append(entry.path)
            elif os.path.splitext(entry.name)[1].lower() in EXTENSIONS:
                yield entry


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # A link to itself; as a file it becomes a row.
        return False


def _text(name: str) -> str:
    """A file name as Unicode; each byte in it that is not UTF-8 becomes U+FFFD and its hexadecimal digits."""
    return re.sub("[\udc80-\udcff]", lambda byte: f"\N{REPLACEMENT CHARACTER}{ord(byte[0]) - 0xDC00:02x}", name)


def _uri(path: str) -> str:
    """A path as it is, or, where it is not Unicode, as a file URL."""
    return path if _text(path) == path else Path(path).as_uri()


def _by_folders(ids: list[str]) -> dict[str, list[str | None]]:
    """The label from the parent folder, the split from a known name above it."""
    labels: list[str | None] = []
    splits: list[str | None] = []
    for name in ids:
        parents = name.split("/")[:-1]
        label = parents.pop() if parents and parents[-1] not in SPLITS else None
        labels.append(label)
        splits.append(next((parent for parent in reversed(parents) if parent in SPLITS), None))
    found = {"label": labels, "split": splits}
    return {key: values for key, values in found.items() if any(values)}


def _by_template(ids: list[str], template: str) -> dict[str, list[str | None]]:
    fields = re.findall(r"\{([A-Za-z_]\w*)\}", template)
    literal = re.split(r"\{[A-Za-z_]\w*\}", template)
    if not fields or len(set(fields)) < len(fields) or any(mark in text for text in literal for mark in "{}"):
        raise SourceError(f"template {template!r} must name different columns, as in '{{year}}/{{site}}/{{name}}'")
    _require_no_clash(fields, f"template {template!r}", "use another name")
    pattern = re.escape(literal[0])
    for key, text in zip(fields, literal[1:], strict=True):
        pattern += f"(?P<{key}>[^/]+?){re.escape(text)}"
    # The template may leave the extension out.
    match = re.compile(pattern + r"(\.[^./]+)?").fullmatch
    rows = [match(name) for name in ids]
    unfit = [name for name, row in zip(ids, rows, strict=True) if row is None]
    if unfit:
        raise SourceError(f"template {template!r} does not fit {len(unfit)} of {len(ids)} paths, such as {unfit[0]!r}")
    return {key: [row[key] for row in rows if row] for key in fields}


# Tables


def _list_table(path: Path, image: str | None, id_column: str | None) -> pa.Table:
    header = _header(path)
    image = image or _only_image_column(path, header)
    for column, option in ((image, "--image"), (id_column, "--id")):
        if column is not None and column not in header:
            raise SourceError(f"{path} has no column {column!r} for {option}; it has {', '.join(header)}")
    table = _read_table(path, {image, id_column or image})
    if not len(table):
        raise SourceError(f"table {path} has no rows")
    own = [name for name in table.column_names if name != image and not (name == id_column and name.lower() == "id")]
    _require_no_clash(own, f"table {path}", "rename it, or pass --id id to use an 'id' as such")
    images = table[image].to_pylist()
    ids = table[id_column or image].to_pylist()
    _require_unique(ids, path)
    urls = [value for value in images if value and "://" in value]
    if urls:
        raise SourceError(f"column {image!r} of {path} holds URLs such as {urls[0]}; only local paths can be read")
    uris = [os.path.join(path.parent, value) if value else "" for value in images]
    return pa.table(
        {
            "id": ids,
            "uri": uris,
            "version": pa.array([_version(Path(uri)) if uri else None for uri in uris], pa.string()),
        }
        | {name: table[name] for name in own}
    )


def _header(path: Path) -> list[str]:
    try:
        if path.suffix.lower() == ".csv":
            with path.open(newline="", encoding="utf-8-sig") as file:
                names: list[str] = next(csv.reader(file), [])
        else:
            names = pq.read_schema(path).names
    except (pa.ArrowException, csv.Error, OSError, UnicodeDecodeError) as error:
        raise _unreadable(path, error) from None
    doubled = [name for name in names if names.count(name) > 1]
    if doubled:
        raise SourceError(f"table {path} has two columns {doubled[0]!r}; rename one of them")
    return names


def _read_table(path: Path, as_text: set[str]) -> pa.Table:
    """Read a table, some of its columns as text."""
    text = dict.fromkeys(as_text, pa.string())
    try:
        if path.suffix.lower() == ".csv":
            # "NA" is no number, but it may be a word: in a column of text only the empty cell is missing.
            options = pyarrow.csv.ConvertOptions(column_types=text, strings_can_be_null=False)
            table = pyarrow.csv.read_csv(path, convert_options=options)
            if pa.binary() in table.schema.types:
                raise SourceError(f"table {path} is not UTF-8; save it as such")
            return pa.table({name: _empty_is_null(table[name]) for name in table.column_names})
        table = pq.read_table(path, partitioning=None).replace_schema_metadata(None)
        fields = [pa.field(field.name, text.get(field.name, field.type)) for field in table.schema]
        return table.cast(pa.schema(fields))
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: Exception) -> SourceError:
    foreign = isinstance(error, UnicodeDecodeError) or "invalid UTF8" in str(error)
    told = "it is not UTF-8; save it as such" if foreign else " ".join(str(error).split())
    return SourceError(f"table {path} cannot be read: {told}")


def _empty_is_null(column: pa.ChunkedArray) -> pa.ChunkedArray:
    if column.type != pa.string():
        return column
    return pc.if_else(pc.equal(column, ""), pa.scalar(None, pa.string()), column)


def _only_image_column(path: Path, header: list[str]) -> str:
    known = [name for name in header if name.lower() in IMAGE_COLUMNS]
    if len(known) != 1:
        raise SourceError(f"name the image column of {path} with --image; it has {', '.join(header)}")
    return known[0]


def _require_no_clash(own: list[str], where: str, remedy: str) -> None:
    clash = [name for name in own if name.lower() in RESERVED or name.lower().startswith("permafrost")]
    if clash:
        raise SourceError(
            f"column {clash[0]!r} of {where} clashes with the listing's own {clash[0].lower()!r}; {remedy}"
        )
    folded = [name.lower() for name in own]
    doubled = [name for name in own if folded.count(name.lower()) > 1]
    if doubled:
        raise SourceError(f"columns {doubled[0]!r} and {doubled[1]!r} of {where} differ only in capitals; rename one")


def _require_unique(ids: list[str | None], path: Path) -> None:
    first: dict[str, int] = {}
    for row, key in enumerate(ids, start=1):
        if key is None:
            raise SourceError(f"row {row} of {path} has no id; pass --id with a column that is always filled")
        if key in first:
            raise SourceError(
                f"id {key!r} stands in rows {first[key]} and {row} of {path}; pass --id with a column without doubles"
            )
        first[key] = row
