"""Shards of a source: which samples are in one, by the hash of their ids."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from features.errors import SourceError


@dataclass(frozen=True)
class Shard:
    """One of `count` shards that together hold every sample once.

    A sample's shard depends on its id alone, so that a new sample moves no other one.

    Attributes
    ----------
    index : int
        From 0 to ``count - 1``.
    count : int
    """

    index: int = 0
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Read ``i/n``.

        Parameters
        ----------
        text : str

        Raises
        ------
        SourceError
            If it is not of that form, or i is not below n.

        Examples
        --------
        >>> from features.sources import list_source
        >>> [len(list_source("photos", shard=Shard.parse(f"{index}/2")).listing) for index in range(2)]
        [14, 10]
        """
        match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text)
        if not match or int(match[1]) >= int(match[2]):
            raise SourceError(f"shard {text!r} must be i/n with i from 0 to n - 1, such as 0/4")
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    def holds(self, ids: pa.ChunkedArray) -> NDArray[np.bool_]:
        """Which ids are in this shard; bool, shape (ids,)."""
        if self.count == 1:
            return np.ones(len(ids), bool)
        return np.fromiter((_hash(key) % self.count == self.index for key in ids.to_pylist()), bool, len(ids))

    def covers(self, other: Shard) -> bool:
        """Whether every sample of another shard is in this one."""
        return other.count % self.count == 0 and other.index % self.count == self.index


ALL = Shard()


def _hash(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big")
