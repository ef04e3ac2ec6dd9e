"""BM25 search with Lucene's arithmetic: same scores, same order; equal scores in the order of the documents' names.

Libraries come close (bm25s among them), but they use exact document lengths, where Lucene stores a
length in one byte; so the formula is written here, on numpy arrays that all worker processes map from the same files.
Knows documents as numbers and names only.
"""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ragdistill.envs.webshop.analysis import analyse
from ragdistill.errors import DataError

K1, B = np.float32(0.9), np.float32(0.4)
"""Pyserini's defaults, which WebShop leaves alone."""
BLOCK = 20_000
"""Documents inverted at once; bounds the memory of a build."""
_EXACT = 24
"""Lengths below this are stored exactly."""

_SCHEMA = "CREATE TABLE terms (term TEXT PRIMARY KEY, start INTEGER, count INTEGER) WITHOUT ROWID"


def decoded_lengths() -> NDArray[np.float32]:
    """Length that Lucene remembers for each stored byte (`SmallFloat.byte4ToInt`)."""
    shift = np.maximum((np.arange(256 - _EXACT) >> 3) - 1, 0)
    low = np.arange(256 - _EXACT) & 7
    large = np.where(np.arange(256 - _EXACT) < 8, low, (low | 8) << shift) + _EXACT
    return np.concatenate([np.arange(_EXACT), large]).astype(np.float32)


def encoded_length(length: int) -> int:
    """The byte Lucene stores for a document of `length` terms (`SmallFloat.intToByte4`)."""
    if length < _EXACT:
        return length
    rest = length - _EXACT
    shift = max(rest.bit_length() - 4, 0)
    mantissa = rest >> shift
    return _EXACT + (mantissa if rest < 8 else (mantissa & 7) | (shift + 1) << 3)


class SearchIndex:
    """`SearchIndex(folder).search("red shoes", 50)` → document numbers, best first. Small and read-only."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        try:
            lengths = np.load(folder / "lengths.npy", mmap_mode="r")
            self._ranks = np.load(folder / "ranks.npy", mmap_mode="r")
            self._docs = np.load(folder / "docs.npy", mmap_mode="r")
            self._counts = np.load(folder / "counts.npy", mmap_mode="r")
            self._terms = sqlite3.connect(f"file:{folder / 'terms.sqlite'}?mode=ro&immutable=1", uri=True)
            total = float((folder / "total.txt").read_text())
        except (OSError, EOFError, ValueError, sqlite3.Error) as e:
            raise self._damaged(e) from None
        self.documents = len(lengths)
        self._counted = max(int(np.count_nonzero(lengths)), 1)  # Lucene does not count documents without a term
        mean = np.float32(total / self._counted)
        norm = np.float32(1) / (K1 * ((np.float32(1) - B) + B * decoded_lengths() / mean))
        self._norms = norm[lengths]

    def search(self, query: str, top: int) -> list[int]:
        """The `top` documents that share a term with `query`."""
        scores = self.scores(query)
        hits = np.flatnonzero(scores > 0)
        if len(hits) > top:
            bar = np.partition(scores[hits], len(hits) - top)[len(hits) - top]
            hits = hits[scores[hits] >= bar]
        return hits[np.lexsort((self._ranks[hits], -scores[hits]))][:top].tolist()

    def scores(self, query: str) -> NDArray[np.float32]:
        """BM25 score of every document; 0 where no term is shared."""
        scores = np.zeros(self.documents, np.float64)
        for term, times in Counter(analyse(query)).items():
            row = self._row(term)
            if row is None:
                continue
            start, n = row
            docs, counts = self._docs[start : start + n], self._counts[start : start + n]
            weight = np.float32(times) * np.float32(np.log(1 + (self._counted - n + 0.5) / (n + 0.5)))
            one = np.float32(1)
            scores[docs] += weight - weight / (one + counts.astype(np.float32) * self._norms[docs])
        return scores.astype(np.float32)

    def _row(self, term: str) -> tuple[int, int] | None:
        try:
            return self._terms.execute("SELECT start, count FROM terms WHERE term = ?", (term,)).fetchone()
        except sqlite3.DatabaseError as e:
            raise self._damaged(e) from None

    def _damaged(self, error: Exception) -> DataError:
        return DataError(f"The search index in {self._folder} is damaged ({error}); delete that folder.")


def build_index(documents: Iterable[tuple[str, str]], folder: Path) -> int:
    """Index (name, text) pairs, in order, into `folder`; returns how many they are. Memory is bounded by `BLOCK`."""
    folder.mkdir(parents=True, exist_ok=True)
    numbers: dict[str, int] = {}
    lengths: list[int] = []
    names: list[str] = []
    blocks: list[Path] = []
    for block in _blocks(documents, numbers, names, lengths):
        blocks.append(folder / f"block{len(blocks)}.npy")
        np.save(blocks[-1], block)
    frequency = np.zeros(len(numbers), np.int64)
    for path in blocks:
        np.add.at(frequency, np.load(path, mmap_mode="r")[:, 0], 1)
    starts = np.concatenate([[0], np.cumsum(frequency)])
    _merge(blocks, starts, folder)
    np.save(folder / "lengths.npy", np.array([encoded_length(n) for n in lengths], np.uint8))
    np.save(folder / "ranks.npy", np.argsort(np.argsort(np.array(names, dtype=np.str_))).astype(np.int32))
    (folder / "total.txt").write_text(str(sum(lengths)))
    with sqlite3.connect(folder / "terms.sqlite") as table:
        table.execute(_SCHEMA)
        rows = ((t, int(starts[i]), int(frequency[i])) for t, i in sorted(numbers.items()))
        table.executemany("INSERT INTO terms VALUES (?, ?, ?)", rows)
    table.close()
    return len(lengths)


def _blocks(
    documents: Iterable[tuple[str, str]], numbers: dict[str, int], names: list[str], lengths: list[int]
) -> Iterator[NDArray[np.int32]]:
    """(term number, document, count) rows of `BLOCK` documents, sorted; fills `numbers`, `names` and `lengths`."""
    rows: list[tuple[int, int, int]] = []
    for doc, (name, text) in enumerate(documents):
        terms = analyse(text)
        names.append(name)
        lengths.append(len(terms))
        rows += [(numbers.setdefault(t, len(numbers)), doc, n) for t, n in Counter(terms).items()]
        if (doc + 1) % BLOCK == 0:
            yield np.array(sorted(rows), np.int32)
            rows = []
    yield np.array(sorted(rows), np.int32).reshape(-1, 3)


def _merge(blocks: list[Path], starts: NDArray[np.int64], folder: Path) -> None:
    """Lay the blocks out term by term; blocks are in document order, so each continues where the last one stopped."""
    size = max(int(starts[-1]), 1)
    docs = np.lib.format.open_memmap(folder / "docs.npy", mode="w+", dtype=np.int32, shape=(size,))
    counts = np.lib.format.open_memmap(folder / "counts.npy", mode="w+", dtype=np.uint16, shape=(size,))
    free = starts[:-1].copy()
    for path in blocks:
        block = np.load(path, mmap_mode="r")
        terms, first, n = np.unique(block[:, 0], return_index=True, return_counts=True)
        at = np.repeat(free[terms] - first, n) + np.arange(len(block))
        docs[at], counts[at] = block[:, 1], np.minimum(block[:, 2], np.iinfo(np.uint16).max)
        free[terms] += n
        path.unlink()
    docs.flush()
    counts.flush()
