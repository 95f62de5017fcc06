"""A store as other libraries hold tables: pandas, Polars, Arrow, and Arrow's datasets, which read only when asked."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
from numpy.typing import NDArray
from pyarrow.fs import FSSpecHandler, LocalFileSystem, PyFileSystem

from features import parts
from features.errors import DataError, StoreError
from features.files import Root
from features.parquet import META, part_schema, part_table

if TYPE_CHECKING:
    import polars

    from features.store import FeatureStore
    from features.views import View


def read(store: FeatureStore, view: str | None) -> tuple[pa.Table, NDArray[np.float32]]:
    """Listed samples that have an embedding, by source and id, and their embeddings: float32, shape (samples, dim)."""
    table = store.snapshot().samples
    table = table.filter(pc.equal(table["status"], "ok"))
    found, embeddings = parts.gather(store.root, store.pick_view(view), table["sha256"])
    return (table, embeddings) if found.all() else (table.filter(pa.array(found)), embeddings[found])


def to_arrow(store: FeatureStore, view: str | None) -> pa.Table:
    """The rows of `read` as one table, with a column ``embedding``: fixed_size_list<float32>[dim].

    Raises
    ------
    DataError
        If there is no such view.
    """
    table, embeddings = read(store, view)
    kind = pa.list_(pa.float32(), embeddings.shape[1])
    return table.append_column(
        "embedding", pa.FixedSizeListArray.from_arrays(pa.array(embeddings.reshape(-1)), type=kind)
    )


def to_pandas(store: FeatureStore, view: str | None) -> pd.DataFrame:
    """The rows of `read` as a data frame; ``embedding`` holds arrays, float32 of shape (dim,), views of one matrix.

    Raises
    ------
    DataError
        If there is no such view.
    """
    table, embeddings = read(store, view)
    frame: pd.DataFrame = table.to_pandas()
    return frame.assign(embedding=list(embeddings))


def to_polars(store: FeatureStore, view: str | None) -> polars.DataFrame:
    """The rows of `read` as a Polars data frame; ``embedding`` is of type Array(Float32, dim).

    Raises
    ------
    DataError
        If there is no such view, or Polars is not installed.
    """
    try:
        import polars
    except ImportError:
        raise DataError("Polars is not installed; pip install polars") from None
    return polars.DataFrame(to_arrow(store, view))


def dataset(store: FeatureStore, view: str | None) -> ds.Dataset:
    """The parts of a view, as they are: ``sha256`` and ``embedding``, nothing read yet.

    Embeddings of images that are not listed are among them, and of an image more than one, where two runs met. Join
    the samples on ``sha256``, and count each only once. On an object store, Arrow's threads read through Python files:
    let none be reading when the interpreter ends; see `features.files.Root.open_native`.

    Raises
    ------
    DataError
        If there is no such view.
    """
    picked = store.pick_view(view)
    files = [f"embeddings/{picked.name}/{name}" for name in parts.names(store.root, picked)]
    return _dataset(store.root, files, part_schema(picked.dim))


def distinct(store: FeatureStore, view: View) -> ds.Dataset:
    """The parts of a view, of an image's embeddings only the first; the keys are read now, the embeddings when asked.

    Of parts that hold something new beside doubles, the new rows are read at once.
    """
    keys = list(parts.keys(store.root, view))
    together = pa.chunked_array([chunk for _, some in keys for chunk in some.chunks], pa.string())
    schema, whole, rest = part_schema(view.dim), [name for name, _ in keys], []
    if pc.count_distinct(together).as_py() < len(together):
        first = pc.index_in(together, value_set=together.combine_chunks()).to_numpy() == np.arange(len(together))
        ends = np.cumsum([len(some) for _, some in keys])
        kept = dict(zip(whole, np.split(first, ends[:-1]), strict=True))
        whole = [name for name, new in kept.items() if new.all()]
        for name in (name for name, new in kept.items() if new.any() and not new.all()):
            sha256, vectors = parts.read(store.root, view, name)
            some = part_table(sha256, vectors)
            rest.append(some.filter(pa.array(kept[name])))
    files = _dataset(store.root, [f"embeddings/{view.name}/{name}" for name in whole], schema)
    return ds.dataset([files, ds.dataset(pa.concat_tables(rest))]) if rest else files


def listing(store: FeatureStore, number: int | None = None) -> ds.Dataset:
    """A snapshot of the listing, the newest by default; of one on a local disk only the schema has been read.

    Raises
    ------
    StoreError
        If there is no such snapshot, or it is damaged.
    """
    number = store.newest() if number is None else number
    if number == 0 or not store.root.is_local:
        return ds.dataset(store.snapshot(number).samples)
    try:
        found = _dataset(store.root, [store.snapshot_file(number)])
        meta = json.loads(found.schema.metadata[META])
    except FileNotFoundError:
        raise StoreError(f"{store.root.path} has no snapshot {number}") from None
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
        raise StoreError(f"snapshot {number} of {store.root.path} is damaged ({error}); restore its file") from None
    if meta["format"] > parts.FORMAT:
        raise StoreError(f"snapshot {number} has format {meta['format']}, this permafrost reads up to {parts.FORMAT}")
    return found.replace_schema(found.schema.remove_metadata())


def _dataset(root: Root, files: list[str], schema: pa.Schema | None = None) -> ds.Dataset:
    fs = LocalFileSystem() if root.is_local else PyFileSystem(FSSpecHandler(root.fs))
    checked = ds.ParquetFileFormat(
        default_fragment_scan_options=ds.ParquetFragmentScanOptions(page_checksum_verification=True)
    )
    fragments = [checked.make_fragment(root.at(file), fs) for file in files]
    return ds.FileSystemDataset(fragments, schema or fragments[0].physical_schema, checked, fs)
