"""Texts as vectors of a pretrained sentence encoder (the library sentence-transformers), kept in the user's cache."""

from __future__ import annotations

import hashlib
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from umda_fast.errors import DataError
from umda_fast.extras import require
from umda_fast.files import atomic_file, cache_folder

__all__ = ["SentenceEncoder"]

_BATCH = 64
_PROBE = "\u00c9lan Vital: the CAT'S 3 ships\u2026"
Matrix = npt.NDArray[np.float32]


class SentenceEncoder:
    """A model of sentence-transformers, with its own pooling and normalisation.

    Args:
        name: a model's folder, or its name on the Hugging Face hub (downloaded once, unless `HF_HUB_OFFLINE` is set).

    Attributes:
        width: of its vectors.
        id: `<width>-<hash>`; the hash is over weights, tokeniser, modules (pooling, normalisation), prompt and the
            longest input: two models with one id give a text the same vector within rounding, wherever they lie.

    Raises:
        DataError: the package is missing, or there is no such model.
    """

    def __init__(self, name: str) -> None:
        require(f"encoder {name!r}", "sentence_transformers")
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as error:  # it is there, but not what it needs
            raise DataError(f"encoder {name!r}: sentence_transformers cannot be imported: {error}") from error
        self.name = name
        try:
            self._model: Any = SentenceTransformer(name)
        except Exception as error:  # the library raises whatever failed below it
            said = " ".join(str(error).split())[:200]
            raise DataError(
                f"encoder: expected the folder or the name of a sentence-transformers model, got {name!r}: {said}"
            ) from error
        self._model.eval()
        self.width: int = self._encode([""], progress=False).shape[1]
        self.id = f"{self.width}-{_identity(self._model)}"

    def _encode(self, texts: Sequence[str], progress: bool) -> Matrix:
        vectors = self._model.encode(list(texts), batch_size=_BATCH, show_progress_bar=progress, convert_to_numpy=True)
        return np.asarray(vectors, dtype=np.float32)

    def encode(self, texts: Sequence[str]) -> Matrix:
        """Vectors float32 [len(texts), width], read from the cache folder where these texts were encoded before.

        A text longer than the model reads is cut by it. Encoding shows its progress on standard error. A cache that
        cannot be read is made anew, and one that cannot be written is done without.
        """
        if not texts:
            return np.zeros((0, self.width), np.float32)
        place = cache_folder() / "texts" / f"{self.id}-{_digest(texts)}.npz"
        known = _read(place, (len(texts), self.width))
        if known is not None:
            return known
        print(f"encoding {len(texts)} texts with {self.name}, once: kept as {place}", file=sys.stderr)
        vectors = self._encode(texts, progress=True)
        if not np.isfinite(vectors).all():
            raise DataError(f"encoder {self.name!r}: expected finite vectors, got NaN or infinities")
        _write(place, vectors)
        return vectors


def _digest(texts: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        data = text.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()[:32]


def _identity(model: Any) -> str:
    """Hash of all that decides what vector a text gets, and of nothing that another release of the library may name
    otherwise: weights, kinds of modules, pooling, longest input, prompt, and what the tokeniser makes of a probe."""
    digest = hashlib.sha256()
    weights = [value.detach().float().cpu().contiguous().numpy() for value in model.state_dict().values()]
    for line in sorted(f"{array.shape} {hashlib.sha256(array.tobytes()).hexdigest()}" for array in weights):
        digest.update(line.encode())
    for module in model:
        digest.update(f"{type(module).__name__} {_pooling(module)}".encode())
    prompt = (model.prompts or {}).get(model.default_prompt_name, "")
    tokenizer = model.tokenizer
    vocabulary = sorted(tokenizer.get_vocab().items())
    # That of static embeddings is one of the library tokenizers, which is not called.
    probe = list(tokenizer(_PROBE)["input_ids"] if callable(tokenizer) else tokenizer.encode(_PROBE).ids)
    digest.update(repr((model.max_seq_length, prompt, vocabulary, probe)).encode())
    return digest.hexdigest()[:16]


def _pooling(module: Any) -> str:
    """Name of a pooling module's mode, modes joined by +; of another module nothing."""
    if hasattr(module, "get_pooling_mode_str"):  # sentence-transformers 3 to 5
        return str(module.get_pooling_mode_str())
    mode = getattr(module, "pooling_mode", "")
    return mode if isinstance(mode, str) else "+".join(mode)


def _read(place: Path, shape: tuple[int, int]) -> Matrix | None:
    """The vectors kept at `place`; None where there are none, or something else. Reading an .npz checks its CRC."""
    try:
        with np.load(place, allow_pickle=False) as arrays:
            found = arrays["X"]
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile):
        return None
    return found if found.shape == shape and found.dtype == np.float32 else None


def _write(place: Path, vectors: Matrix) -> None:
    try:
        with atomic_file(place) as stream:
            np.savez(stream, X=vectors)
    except OSError as error:
        print(f"{place}: cannot be kept: {error.strerror or error}", file=sys.stderr)
