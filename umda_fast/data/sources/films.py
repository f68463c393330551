"""The films source: a directory with `movies.csv` and `poster_features.npy`; a film is a bag, a sentence an instance.

movies.csv            a row per film; `id` names it. `overview` and `tagline` are its plot. Labels: `genres` (separated
                      by a bar), `runtime` (minutes), `revenue`, `original_language`, `release_date`. `split`
                      (train, val, test) may be absent. Blank is missing.
poster_features.npy   [films, d], rows in the order of movies.csv; a row of NaN is a missing poster

Instances: the whole plot, then (with more than one) each of its sentences. Views: `text`, hashed n-grams of the
instance's words (or features of the user's own); with an encoder `embedding`, its vector for them; and `poster`, which
every instance of a film shares: what a sentence says is so read beside what the poster shows. A film without a plot
is one instance without text.

Tasks: `genres` (multilabel), `runtime` (regression, minutes), `revenue` (regression, log10 of it, 0 counts as
missing: it spans six orders of magnitude), `language` and `decade` (multiclass; languages and decades that fewer than
one film in a hundred has are `other` and `earlier`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from umda_fast.data.arrays import FloatArray, IntArray
from umda_fast.data.bag import Bag, bag_labels
from umda_fast.data.dataset import BagDataset
from umda_fast.data.files.tables import known_text, read_table
from umda_fast.data.labels import ClassWeights
from umda_fast.data.options import as_names, option, some_of
from umda_fast.data.sources.base import BagSource, Folds, GivenSplit, OpenedSource
from umda_fast.data.sources.npz import read_npz
from umda_fast.data.sources.text import WIDTH, text_features
from umda_fast.data.sources.text import sentences as sentences_of
from umda_fast.data.sources.text_encoder import SentenceEncoder
from umda_fast.data.splits import SPLITS, parts_of
from umda_fast.errors import DataError
from umda_fast.model.specs import TaskSpec, ViewSpec
from umda_fast.tasks.columns import parse_number

TABLE = "movies.csv"
POSTERS = "poster_features.npy"
TASKS: dict[str, str] = {
    "genres": "multilabel",
    "runtime": "regression",
    "revenue": "regression",
    "language": "multiclass",
    "decade": "multiclass",
}
_VIEWS = ("text", "embedding", "poster")
_COLUMNS = {
    "genres": "genres",
    "runtime": "runtime",
    "revenue": "revenue",
    "language": "original_language",
    "decade": "release_date",
}
_RARE = 0.01
_EARLIER = "earlier"
_FloatMatrix = npt.NDArray[np.float32]


def is_films(source: str) -> bool:
    """Whether `source` is a directory with both files."""
    return (Path(source) / TABLE).is_file() and (Path(source) / POSTERS).is_file()


@dataclass(frozen=True)
class _Table:
    path: Path
    columns: dict[str, list[str]]

    def column(self, name: str) -> list[str]:
        if name not in self.columns:
            raise DataError(f"{self.path}: expected a column {name!r}, got {', '.join(self.columns)}")
        return self.columns[name]


def _read_table(path: Path) -> _Table:
    read = read_table(path)
    table = _Table(path, {name: [row[index] for row in read.rows] for index, name in enumerate(read.header)})
    names = table.column("id")
    if "" in names:
        raise DataError(f"{path}: id: expected one for every film, got a blank for film {names.index('') + 1}")
    return table


def _matrix(path: Path) -> _FloatMatrix:
    try:
        array = np.load(path, allow_pickle=False, mmap_mode="r")
    except (OSError, EOFError, ValueError) as error:
        raise DataError(f"{path}: expected a readable .npy array of numbers, got: {error}") from error
    if array.ndim != 2 or array.shape[1] == 0 or array.dtype.kind not in "fiu":
        raise DataError(f"{path}: expected numbers [films, d], got {array.dtype} {list(array.shape)}")
    return np.array(array, dtype=np.float32)


def _posters(path: Path, films: int) -> _FloatMatrix:
    posters = _matrix(path)
    if len(posters) != films:
        raise DataError(f"{path}: expected {films} rows, one for each film of {TABLE}, got {len(posters)}")
    wrong = ~np.isfinite(posters).all(axis=1) & ~np.isnan(posters).all(axis=1)
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        raise DataError(f"{path}: row {row}: expected finite numbers, or all NaN for a missing poster, got a mixture")
    return posters


def _plots(table: _Table, fields: Sequence[str], cut: bool) -> list[list[str]]:
    """The texts of every film: the whole plot, then with `cut` its sentences where there are several; [] without a
    plot."""
    texts = [table.column(name) for name in fields]
    plots = []
    for parts in zip(*texts, strict=True):
        found = [sentence for part in parts for sentence in sentences_of(part)]
        whole = [" ".join(found)] if found else []
        plots.append([*whole, *found] if cut and len(found) > 1 else whole)
    return plots


def _own_text(path: Path, films: int) -> tuple[_FloatMatrix, IntArray]:
    """Embeddings of the user's own: an .npz with X [N, d] and ptr [films+1]."""
    arrays = read_npz(str(path))
    missing = [name for name in ("X", "ptr") if name not in arrays]
    if missing:
        raise DataError(f"{path}: expected X [N, d] and ptr [films+1], got {', '.join(arrays) or 'no array'}")
    data = BagDataset.from_arrays({"text": arrays["X"]}, arrays["ptr"], name=str(path))
    if len(data) != films:
        raise DataError(f"{path}: ptr: expected {films + 1} values for the films of {TABLE}, got {len(data) + 1}")
    return np.asarray(arrays["X"], dtype=np.float32), np.asarray(arrays["ptr"], dtype=np.int64)


class FilmStore:
    """Films as bags; texts are kept sparse and made dense when a bag is loaded.

    Args:
        names: [B].
        texts: view -> features of all texts, a CSR matrix or an array [M, d].
        ptr: int64 [B+1]; film b owns rows ptr[b]:ptr[b+1] of them.
        posters: float32 [B, d], rows of NaN where missing, or None without that view.
        tasks, labels: task name -> column.
    """

    def __init__(
        self,
        names: Sequence[str],
        texts: Mapping[str, Any],
        ptr: IntArray,
        posters: _FloatMatrix | None,
        tasks: Sequence[TaskSpec],
        labels: Mapping[str, FloatArray],
    ) -> None:
        self._texts = dict(texts)
        self._ptr = ptr
        self._posters = posters
        self._tasks = tuple(tasks)
        self.names = names
        self.sizes: IntArray = np.maximum(np.diff(ptr), 1)
        self.labels = labels

    def load(self, index: int) -> Bag:
        first, last = int(self._ptr[index]), int(self._ptr[index + 1])
        n = int(self.sizes[index])
        views, present = {}, []
        for view, features in self._texts.items():
            rows = features[first:last]
            dense = rows if isinstance(rows, np.ndarray) else rows.toarray()
            views[view] = torch.from_numpy(dense if last > first else np.zeros((n, dense.shape[1]), np.float32))
            present.append(last > first)
        if self._posters is not None:
            poster = torch.from_numpy(self._posters[index])
            views["poster"] = poster.expand(n, -1)
            present.append(not bool(poster.isnan().all()))
        labels = bag_labels(self._tasks, self.labels, index)
        return Bag(self.names[index], views, torch.tensor([present]).expand(n, -1), labels)


def _number(path: Path, column: str, film: str, text: str) -> float:
    value = parse_number(text, said=True) if known_text(text) else math.nan
    if value is None or math.isinf(value):
        raise DataError(f"{path}: {column} of film {film!r}: expected a number or a blank, got {text!r}")
    return value


def _classes(texts: Sequence[str], rest: str) -> tuple[str, ...]:
    """The classes that at least one in a hundred has, in alphabetical order, with `rest` for the others if any:
    behind them, but `earlier` before."""
    counts = Counter(text for text in texts if text)
    total = sum(counts.values())
    kept = sorted(text for text, count in counts.items() if count >= _RARE * total)
    if len(kept) == len(counts):
        return tuple(kept)
    return (rest, *kept) if rest == _EARLIER else (*kept, rest)


def _decade(path: Path, film: str, date: str) -> str:
    if date and not date[:4].isdigit():
        raise DataError(f"{path}: release_date of film {film!r}: expected YYYY-MM-DD or a blank, got {date!r}")
    return f"{date[:3]}0s" if date else ""


def _task(table: _Table, name: str, rows: IntArray, given: TaskSpec | None) -> tuple[TaskSpec, FloatArray]:
    """A task and its labels; classes are those of the films at `rows`, or as given."""
    path, films = table.path, table.column("id")
    texts = table.column(_COLUMNS[name])
    kind = TASKS[name]
    if given is not None and given.kind != kind:
        raise DataError(f"{path}: kinds: expected {kind} for {name!r}, got {given.kind}")
    if kind == "regression":
        numbers = np.array([_number(path, _COLUMNS[name], film, text) for film, text in zip(films, texts, strict=True)])
        if name == "revenue":
            numbers = np.log10(np.where(numbers > 0, numbers, np.nan))
        return given or TaskSpec(name, kind), numbers
    if name == "decade":
        texts = [_decade(path, film, date) for film, date in zip(films, texts, strict=True)]
    if kind == "multilabel":
        sets = [{part.strip() for part in text.split("|") if part.strip()} for text in texts]
        labels = given.labels if given is not None else tuple(sorted({label for row in rows for label in sets[row]}))
        if not labels:
            raise DataError(f"{path}: {name}: expected at least one genre in the training films, got none")
        column = np.array([[label in found for label in labels] if found else [np.nan] * len(labels) for found in sets])
        return given or TaskSpec(name, kind, len(labels), labels=labels), column.astype(np.float64)
    rest = _EARLIER if name == "decade" else "other"
    labels = given.labels if given is not None else _classes([texts[row] for row in rows], rest)
    if labels is None or len(labels) < 2:
        raise DataError(
            f"{path}: {_COLUMNS[name]}: expected at least two classes, got {', '.join(labels or ()) or 'none'}"
        )
    index = {label: float(position) for position, label in enumerate(labels)}
    column = np.array([index.get(text, index.get(rest, math.nan)) if text else math.nan for text in texts])
    return given or TaskSpec(name, kind, len(labels), labels=labels), column


@dataclass(frozen=True, kw_only=True)
class FilmsSource(BagSource):
    """Films from a directory, split as its table says.

    A table that has train and val only leaves nothing to choose weights and thresholds on but what is reported:
    its val is then the test split, and val is taken out of train, stratified. Without a column `split` the films
    are split at random. Cross-validation does not use the column.

    Attributes:
        views, tasks: those to use; None for all.
        fields: columns of the table that make the plot, for example with `title` among them.
        sentences: whether each sentence is an instance beside the whole plot, or the plot is the only one.
        text_width: width of the view `text`.
        text: an .npz with features of the user's own instead: X [N, d], and ptr [films+1], film b owns rows
            ptr[b]:ptr[b+1].
        encoder: folder or name of a sentence-transformers model, which makes the view `embedding`; None: no such view.
        encoder_id: `SentenceEncoder.id` that it must have; a run remembers that of its training.
        kinds: specs with fixed classes, as another dataset's `tasks`; genres that they lack are left out.
        val_share, test_share: of the films, where the table does not say.
        class_weights: "balanced" or None.
    """

    views: Sequence[str] | None = None
    tasks: Sequence[str] | None = None
    fields: Sequence[str] = ("overview", "tagline")
    sentences: bool = True
    text_width: int = WIDTH
    text: str | None = option(None, local=True, path=True)
    encoder: str | None = option(None, path=True)
    encoder_id: str | None = None
    kinds: Sequence[TaskSpec] | None = None
    val_share: float = 0.1
    test_share: float = option(0.1, folds=False)
    class_weights: ClassWeights = None

    def open(self, path: str, folds: Folds | None) -> OpenedSource:
        """Raises DataError naming the file and the column or row, what was expected and what came."""
        place = Path(path)
        table = _read_table(place / TABLE)
        films = table.column("id")
        views = self._views(place)
        texts, ptr, fixed = self._texts(place, table, views)
        split = _split_column(table)
        posters = _posters(place / POSTERS, len(films)) if "poster" in views else None
        arrays = texts if posters is None else {**texts, "poster": posters}
        tasks = some_of(place, "tasks", self.tasks, tuple(TASKS))
        given = [] if split is None or folds is not None else [_given_split(split)]
        # Classes are those of the films that the table trains on, also where val is then taken out of them.
        rows = given[0].parts["train"] if given else np.arange(len(films))
        kinds = {task.name: task for task in self.kinds or () if task.name in TASKS}
        found = [_task(table, name, rows, kinds.get(name)) for name in tasks]
        specs = [task for task, _ in found]
        store = FilmStore(films, texts, ptr, posters, specs, {task.name: column for task, column in found})
        widths = [ViewSpec(name, array.shape[1]) for name, array in arrays.items()]
        dataset = BagDataset(store, widths, specs, str(place))
        return OpenedSource(
            dataset,
            name=place.resolve().name,
            summary=f"{len(dataset)} films, {int(dataset.sizes.sum())} instances, {len(specs)} task(s)",
            given=given,
            keep=list(kinds),
            fixed=fixed,
        )

    def _views(self, place: Path) -> tuple[str, ...]:
        known = _VIEWS if self.encoder is not None else tuple(view for view in _VIEWS if view != "embedding")
        if self.encoder is None and self.views is not None and "embedding" in self.views:
            raise DataError(f"{place}: views: 'embedding' needs `encoder`, a sentence-transformers model, got none")
        return some_of(place, "views", self.views, known)

    def _texts(
        self, place: Path, table: _Table, views: Sequence[str]
    ) -> tuple[dict[str, Any], IntArray, dict[str, Any]]:
        """View -> features of all texts, the films' offsets in them, and what identifies the encoder."""
        films = len(table.column("id"))
        if "text" in views and self.text is not None:
            if "embedding" in views:
                raise DataError(f"{place}: expected `text` or `encoder`, got both: features of one's own have no words")
            text, ptr = _own_text(Path(self.text), films)
            return {"text": text}, ptr, {}
        if not set(views) & {"text", "embedding"}:
            return {}, np.arange(films + 1, dtype=np.int64), {}
        plots = _plots(table, as_names(self.fields), self.sentences)
        words = [text for plot in plots for text in plot]
        texts: dict[str, Any] = {}
        fixed: dict[str, Any] = {}
        if "text" in views:
            texts["text"] = text_features(words, self.text_width)
        if "embedding" in views:
            assert self.encoder is not None
            model = SentenceEncoder(self.encoder)
            if self.encoder_id not in (None, model.id):
                raise DataError(
                    f"encoder {self.encoder!r}: expected the model with the id {self.encoder_id} (its width, then a "
                    f"hash of weights, tokeniser and pooling), which this run was trained with, got {model.id}"
                )
            texts["embedding"] = model.encode(words)
            fixed["encoder_id"] = model.id
        return texts, np.array([0, *(len(plot) for plot in plots)], dtype=np.int64).cumsum(), fixed


def _split_column(table: _Table) -> list[str] | None:
    """The table's column `split`, if it has one."""
    if "split" not in table.columns:
        return None
    split = table.column("split")
    for film, value in zip(table.column("id"), split, strict=True):
        if value not in SPLITS:
            expected = ", ".join(SPLITS)
            raise DataError(f"{table.path}: split of film {film!r}: expected one of {expected}, got {value!r}")
    return split


def _given_split(split: Sequence[str]) -> GivenSplit:
    parts = parts_of(split)
    if len(parts["test"]):
        return GivenSplit(parts, "split as the table says")
    parts["test"], parts["val"] = parts["val"], parts["test"]
    return GivenSplit(parts, "test is the table's val, val is taken out of its train")
