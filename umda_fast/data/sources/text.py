"""Sentences of a text and their features: hashed character n-grams, nothing downloaded, nothing fitted."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from umda_fast.extras import require

__all__ = ["WIDTH", "sentences", "text_features"]

WIDTH = 8192
_NGRAMS = (3, 5)
_STOP = re.compile(r"(?<=[.!?\u2026])[\"'\u201d\u2019)\]]*\s+(?=[\"'\u201c\u2018(\[]?[A-Z0-9\u00c0-\u00de])")
_ABBREVIATION = re.compile(r"(?:^|\W)(?:[A-Z]|Mr|Mrs|Ms|Dr|St|Jr|Sr|Lt|Sgt|Capt|Col|Gen|Prof|Rev|Hon|Mt|vs|No)\.$")


def sentences(text: str) -> list[str]:
    """The sentences of a text: cut where a full stop, question or exclamation mark is followed by a blank and a
    capital or a digit, but not after an initial or a title (Dr.)."""
    parts: list[str] = []
    for part in _STOP.split(" ".join(text.split())):
        if parts and _ABBREVIATION.search(parts[-1]):
            parts[-1] += f" {part}"
        elif part:
            parts.append(part)
    return parts


def text_features(texts: Sequence[str], width: int = WIDTH) -> Any:
    """Texts as sparse vectors, a scipy CSR matrix float32 [len(texts), width].

    Character n-grams of 3 to 5 letters inside words, lower case and without accents, hashed with a sign; counts c
    as sign(c) log(1 + |c|); rows of length 1, but for a text without letters, which is 0. No vocabulary and nothing
    fitted: the same text has the same features in every file, in training and after it.

    Method: Weinberger et al., "Feature hashing for large scale multitask learning", 2009, with the subword n-grams
    of Bojanowski et al., "Enriching word vectors with subword information", 2017.
    """
    require("reading plots of films", "sklearn")
    from sklearn.feature_extraction.text import HashingVectorizer
    from sklearn.preprocessing import normalize

    hashing = HashingVectorizer(
        analyzer="char_wb", ngram_range=_NGRAMS, n_features=width, norm=None, strip_accents="unicode", dtype=np.float32
    )
    counts = hashing.transform(list(texts))
    counts.data = np.sign(counts.data) * np.log1p(np.abs(counts.data))
    counts.eliminate_zeros()
    return normalize(counts, copy=False)
