import csv
import json
import sys

import numpy as np
import pytest
import torch

from umda_fast.data import load_source
from umda_fast.data.sources.text_encoder import SentenceEncoder
from umda_fast.errors import DataError
from umda_fast.extras import MissingExtraError
from umda_fast.files import cache_folder
from umda_fast.train import evaluate, load_run, make_config, predict, run_config, train

WORDS = ["a", "ship", "sinks", "nobody", "swims", "war", "he", "said", "then", "left", ".", "!", "one", "sentence"]
TEXTS = ["A ship sinks.", "Nobody swims!", "war"]


def save_encoder(place, *, width=16, seed=0, pooling="mean"):
    """A tiny BERT of random weights in a folder as sentence-transformers keeps its models."""
    pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    model = place / "model"
    (model / "1_Pooling").mkdir(parents=True)
    (model / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]) + "\n")
    transformers.BertTokenizerFast(str(model / "vocab.txt")).save_pretrained(model)
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "max_position_embeddings": 32}
    config = transformers.BertConfig(vocab_size=len(WORDS) + 5, hidden_size=width, **sizes)
    transformers.BertModel(config).save_pretrained(model)
    modes = {f"pooling_mode_{mode}": mode.startswith(pooling) for mode in ("cls_token", "mean_tokens", "max_tokens")}
    kind = "sentence_transformers.models"
    files = {
        "modules.json": [
            {"idx": 0, "name": "0", "path": "", "type": f"{kind}.Transformer"},
            {"idx": 1, "name": "1", "path": "1_Pooling", "type": f"{kind}.Pooling"},
        ],
        "sentence_bert_config.json": {"max_seq_length": 32, "do_lower_case": False},
        "1_Pooling/config.json": {"word_embedding_dimension": width, **modes},
    }
    for name, content in files.items():
        (model / name).write_text(json.dumps(content))
    return str(model)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path / "cache" / "umda_fast" / "texts"


@pytest.fixture
def films(tmp_path):
    """A directory of 40 films with plots of up to two sentences."""
    place = tmp_path / "films"
    place.mkdir()
    rows = [
        {
            "id": f"f{row}",
            "overview": ("A ship sinks. Nobody swims.", "", "War!")[row % 3],
            "tagline": "",
            "genres": ("Drama|War", "Comedy")[row % 2],
            "split": ("train", "train", "val", "test")[row % 4],
        }
        for row in range(40)
    ]
    with open(place / "movies.csv", "w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    np.save(place / "poster_features.npy", np.random.default_rng(0).normal(size=(40, 6)).astype(np.float32))
    return place


class TestEncoder:
    def test_is_the_library_s_own_result(self, tmp_path):
        name = save_encoder(tmp_path)
        encoder = SentenceEncoder(name)
        from sentence_transformers import SentenceTransformer

        expected = SentenceTransformer(name).encode(TEXTS)
        found = encoder.encode(TEXTS)
        assert found.dtype == np.float32
        assert encoder.width == 16
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
        assert encoder.encode([]).shape == (0, 16)

    def test_id_is_of_the_content_not_of_the_place(self, tmp_path):
        first = SentenceEncoder(save_encoder(tmp_path / "a"))
        same = SentenceEncoder(save_encoder(tmp_path / "b"))
        weights = SentenceEncoder(save_encoder(tmp_path / "c", seed=1))
        pooling = SentenceEncoder(save_encoder(tmp_path / "d", pooling="cls"))
        assert first.id == same.id
        assert first.id.startswith("16-")
        assert len({first.id, weights.id, pooling.id}) == 3

    def test_is_read_from_the_cache(self, tmp_path, cache, capsys, monkeypatch):
        encoder = SentenceEncoder(save_encoder(tmp_path))
        assert cache_folder() / "texts" == cache
        first = encoder.encode(TEXTS)
        assert "encoding 3 texts" in capsys.readouterr().err
        assert len(list(cache.iterdir())) == 1
        monkeypatch.setattr(encoder, "_encode", lambda *_, **__: pytest.fail("encoded again"))
        np.testing.assert_array_equal(encoder.encode(TEXTS), first)
        with pytest.raises(pytest.fail.Exception, match="encoded again"):
            encoder.encode(TEXTS[::-1])

    @pytest.mark.parametrize("damage", ["cut", "flipped", "other", "shape"])
    def test_a_broken_cache_is_made_anew(self, tmp_path, cache, damage):
        encoder = SentenceEncoder(save_encoder(tmp_path))
        first = encoder.encode(TEXTS)
        (file,) = cache.iterdir()
        content = bytearray(file.read_bytes())
        if damage == "cut":
            file.write_bytes(content[:-40])
        elif damage == "flipped":
            content[content.index(first.tobytes()) + 5] ^= 1
            file.write_bytes(content)
        elif damage == "other":
            file.write_bytes(b"not numpy")
        else:
            np.savez(file, X=first[:2])
        np.testing.assert_array_equal(encoder.encode(TEXTS), first)
        with np.load(file) as arrays:
            np.testing.assert_array_equal(arrays["X"], first)
        assert list(cache.iterdir()) == [file]

    def test_does_without_a_cache_that_cannot_be_written(self, tmp_path, cache, capsys):
        encoder = SentenceEncoder(save_encoder(tmp_path))
        cache.parent.parent.mkdir(exist_ok=True)
        cache.parent.write_text("a file where the folder should be")
        assert encoder.encode(TEXTS).shape == (3, 16)
        assert "cannot be kept" in capsys.readouterr().err

    def test_no_such_model(self, tmp_path):
        pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
        with pytest.raises(DataError, match=r"encoder: expected the folder or the name .* got '.*nowhere'") as error:
            SentenceEncoder(str(tmp_path / "nowhere"))
        assert "\n" not in str(error.value)

    def test_without_the_package(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "sentence_transformers", None)
        with pytest.raises(MissingExtraError, match=r"encoder 'x' needs sentence_transformers, .*umda_fast\[text\]"):
            SentenceEncoder("x")


class TestFilms:
    def test_three_views(self, films, tmp_path):
        name = save_encoder(tmp_path)
        splits = load_source(films, tasks=["genres"], text_width=64, encoder=name)
        data = splits.whole
        assert [(view.name, view.width) for view in data.views] == [("text", 64), ("embedding", 16), ("poster", 6)]
        texts = ["A ship sinks. Nobody swims.", "A ship sinks.", "Nobody swims."]
        expected = SentenceEncoder(name).encode(texts)
        np.testing.assert_allclose(data[0].views["embedding"], expected, rtol=1e-5, atol=1e-6)
        assert data[0].mask.all()
        assert data[1].mask.tolist() == [[False, False, True]]
        assert splits.fixed == {"encoder_id": SentenceEncoder(name).id}

    def test_views_choose(self, films, tmp_path, cache):
        name = save_encoder(tmp_path)
        only = load_source(films, tasks=["genres"], encoder=name, views=["embedding"], sentences=False)
        assert [view.name for view in only.views] == ["embedding"]
        other = load_source(films, tasks=["genres"], encoder="/no/such/model", views=["text"])
        assert [view.name for view in other.views] == ["text"]  # an encoder that is not used is not read
        assert other.fixed == {}
        with pytest.raises(DataError, match="views: 'embedding' needs `encoder`"):
            load_source(films, views=["embedding"])
        np.savez(tmp_path / "own.npz", X=np.zeros((40, 3), np.float32), ptr=np.arange(41))
        with pytest.raises(DataError, match="expected `text` or `encoder`, got both"):
            load_source(films, text=str(tmp_path / "own.npz"), encoder=name)

    def test_a_run_keeps_to_its_encoder(self, films, tmp_path):
        name = save_encoder(tmp_path / "first")
        data = {
            "source": str(films),
            "options": {"tasks": ["genres"], "encoder": name, "text_width": 64},
            "standardize": ["embedding", "poster"],
        }
        model = {"width": 16, "heads": 2, "layers": 1}
        values = {"data": data, "model": model, "train": {"epochs": 1}, "device": "cpu"}
        run = tmp_path / "run"
        train(make_config(values), run, progress=False, plots=False)
        assert load_run(run).config.data.options["encoder_id"] == SentenceEncoder(name).id
        evaluate(load_run(run), progress=False)
        predict(load_run(run), out=tmp_path / "p.csv", progress=False)
        more = run_config(run, {"train": {"epochs": 2}})
        train(more, run, resume=True, progress=False, plots=False)
        # Another model under the old name: same width, other weights.
        other = save_encoder(tmp_path / "other", seed=1)
        (tmp_path / "first" / "model").rename(tmp_path / "first" / "moved")
        (tmp_path / "other" / "model").rename(tmp_path / "first" / "model")
        assert other != name
        for use in (
            lambda: evaluate(load_run(run), progress=False),
            lambda: predict(load_run(run), source=str(films), out=tmp_path / "q.csv", progress=False),
            lambda: train(run_config(run, {"train": {"epochs": 3}}), run, resume=True, progress=False, plots=False),
        ):
            with pytest.raises(DataError, match=r"encoder '.*model': expected the model with the id 16-.* got 16-"):
                use()
