"""One file: what its header says, what is read, and what is refused."""

from __future__ import annotations

import math
import pickle
import subprocess
import sys

import h5py
import numpy as np
import pytest
import torch

from tests.slide_files import grid, write_clam, write_stamp, write_trident
from umda_fast.data import load_source
from umda_fast.data.files.bag_file import check_step
from umda_fast.data.files.readers import read_bag, read_coords, read_header
from umda_fast.errors import DataError


@pytest.fixture
def features():
    return np.random.default_rng(0).normal(size=(70, 6)).astype(np.float32)


@pytest.fixture
def coords():
    return grid(np.random.default_rng(1), 70)


class TestHDF5:
    def test_clam(self, tmp_path, features, coords):
        # 70 rows in batches of 20: chunks of 32 rows, the last one not full.
        file = read_header(write_clam(tmp_path, "a", features, coords, batch=20))
        assert (file.tool, file.rows, file.width, file.dtype) == ("CLAM", 70, 6, torch.float32)
        assert (file.unit, file.encoder) == ("px", None)
        assert math.isnan(file.patch_size)
        got, where = read_bag(file)
        np.testing.assert_array_equal(got, features)
        np.testing.assert_array_equal(where, coords)
        np.testing.assert_array_equal(read_coords(file), coords)

    @pytest.mark.parametrize("dtype", [np.float32, np.float16])
    def test_trident(self, tmp_path, features, coords, dtype):
        file = read_header(write_trident(tmp_path, "a", features.astype(dtype), coords, overlap=64))
        assert (file.tool, file.unit, file.encoder) == ("TRIDENT", "px", "uni_v1")
        assert (file.patch_size, file.step) == (512, 512 - 64 * 2)  # the overlap is at 20x
        got, where = read_bag(file)
        assert got.dtype == file.dtype
        np.testing.assert_array_equal(got, features.astype(dtype))
        np.testing.assert_array_equal(where, coords)

    @pytest.mark.parametrize("shape", [(0,), (0, 6)])
    def test_trident_without_tissue(self, tmp_path, shape):
        path = write_trident(tmp_path, "a", np.empty(shape, np.float32), np.empty((0, 2)), encoder=None)
        file = read_header(path)
        assert (file.rows, file.width, file.encoder) == (0, shape[1] if len(shape) > 1 else None, None)
        got, where = read_bag(file)
        assert got.shape[0] == 0
        assert where.shape == (0, 2)

    def test_stamp(self, tmp_path, features, coords):
        places = coords / 2 + 0.125
        file = read_header(write_stamp(tmp_path, "a", features, places))
        assert (file.tool, file.unit, file.patch_size, file.encoder) == ("STAMP", "um", 256, "uni")
        got, where = read_bag(file)
        assert got.dtype == torch.float16
        np.testing.assert_array_equal(got, features.astype(np.float16))
        np.testing.assert_array_equal(where, places)

    @pytest.mark.parametrize(
        ("said", "scale"),
        [
            ({"tile_size_um": None, "tile_size": 256.0}, 1.0),  # 2.0
            ({"tile_size_um": None, "tile_size": 224, "unit": "px"}, 256 / 224),  # before
            ({"tile_size_um": None, "unit": None}, 256 / 224),  # nothing said, 224 apart
        ],
    )
    def test_older_stamp(self, tmp_path, features, coords, said, scale):
        step = 256 if scale == 1.0 else 224
        places = coords / 512 * step
        file = read_header(write_stamp(tmp_path, "a", features, places, **said))
        assert file.patch_size == 256
        np.testing.assert_allclose(read_bag(file)[1], places * scale)

    @pytest.mark.parametrize("said", [{"unit": "mm"}, {"unit": "px", "tile_size_um": None, "tile_size": 512}])
    def test_stamp_in_another_unit(self, tmp_path, features, coords, said):
        with pytest.raises(DataError, match=r"a\.h5: wrong unit: expected coordinates in micrometres"):
            read_header(write_stamp(tmp_path, "a", features, coords, **said))

    def test_pixels_called_micrometres(self, tmp_path, features, coords):
        file = read_header(write_stamp(tmp_path, "a", features, coords * 100.0))
        with pytest.raises(DataError, match=r"a\.h5: coords: wrong unit: .* wider than any slide"):
            read_bag(file)

    def test_coordinates_of_another_level(self, tmp_path, features, coords):
        file = read_header(write_trident(tmp_path, "a", features, coords // 4))
        with pytest.raises(DataError, match=r"a\.h5: coords: wrong unit: .*at least 512 px apart.*got 128"):
            check_step(file, read_bag(file)[1])
        right = read_header(write_trident(tmp_path, "b", features, coords))
        check_step(right, read_bag(right)[1])

    @pytest.mark.parametrize("kind", ["gzip", "big_endian", "contiguous", "wide_chunks", "holes", "userblock"])
    def test_other_ways_to_store(self, tmp_path, features, coords, kind):
        """Whatever HDF5 alone can read is read by it, and chunks that are read directly come out the same."""
        path = tmp_path / "a.h5"
        with h5py.File(path, "w", userblock_size=512 if kind == "userblock" else 0) as file:
            options = {
                "gzip": {"chunks": (8, 6), "compression": "gzip"},
                "big_endian": {"dtype": ">f4", "chunks": (8, 6)},
                "contiguous": {},
                "wide_chunks": {"chunks": (8, 3)},
                "holes": {"chunks": (8, 6)},
                "userblock": {"chunks": (8, 6)},
            }[kind]
            data = file.create_dataset("features", shape=features.shape, **{"dtype": "f4", **options})
            data[:40] = features[:40]
            if kind != "holes":
                data[40:] = features[40:]
            file["coords"] = coords
            file["coords"].attrs["unit"] = "micron"
            file["coords"].attrs["mpp"] = 0.25
        header = read_header(path)
        assert (header.unit, header.pixel_size) == ("um", 0.25)
        expected = features.copy()
        if kind == "holes":
            expected[40:] = 0.0  # never written: HDF5's fill value
        np.testing.assert_array_equal(read_bag(header)[0], expected)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ({"coords": np.zeros((3, 2))}, "expected features"),
            ({"features": np.zeros((2, 3, 4), np.float32)}, r"features: expected \[N, D\], got \[2, 3, 4\]"),
            ({"features": np.zeros((3, 0), np.float32)}, r"features: expected \[N, D\]"),
            ({"features": np.zeros((3, 4), np.int64)}, "features: expected float16, float32 or float64"),
            (
                {"features": np.zeros((3, 4), np.float32), "coords": np.zeros((4, 2), np.int32)},
                r"coords: expected \[3, 2\], one row for each of the features, got \[4, 2\]",
            ),
        ],
    )
    def test_refused(self, tmp_path, content, message):
        path = tmp_path / "a.h5"
        with h5py.File(path, "w") as file:
            for key, value in content.items():
                file[key] = value
        with pytest.raises(DataError, match=r"a\.h5: " + message):
            read_header(path)

    def test_a_vector_for_a_whole_slide(self, tmp_path, features, coords):
        path = write_stamp(tmp_path, "a", features[:1], coords[:1], feat_type="slide")
        header = read_header(path)
        assert (header.whole, header.rows, header.unit, header.tiling) == ("slide", 1, None, "slide")
        read, where = read_bag(header)
        assert where is None
        assert torch.equal(read, torch.from_numpy(features[:1].astype(np.float16)))

    def test_not_finite(self, tmp_path, features, coords):
        features[41, 3] = np.nan
        file = read_header(write_clam(tmp_path, "a", features, coords))
        with pytest.raises(DataError, match=r"a\.h5: features: .*got nan at row 41, column 3 \(1 such rows\)"):
            read_bag(file)
        places = coords + 0.0
        places[3, 1] = np.inf
        file = read_header(write_stamp(tmp_path, "b", np.zeros((70, 2)), places))
        with pytest.raises(DataError, match=r"b\.h5: coords: expected finite numbers, got .* at row 3"):
            read_bag(file)

    def test_large_values_are_finite(self, tmp_path, coords):
        big = np.full((70, 6), 60_000, np.float16)  # the sum is infinite in float16, not in float64
        file = read_header(write_trident(tmp_path, "a", big, coords))
        assert float(read_bag(file)[0].max()) == 60_000


class TestPt:
    @pytest.mark.parametrize("legacy", [False, True])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_tensor(self, tmp_path, features, legacy, dtype):
        path = tmp_path / "a.pt"
        torch.save(torch.from_numpy(features).to(dtype), path, _use_new_zipfile_serialization=not legacy)
        file = read_header(path)
        assert (file.rows, file.width, file.dtype, file.unit) == (70, 6, dtype, None)
        got, where = read_bag(file)
        assert where is None
        assert torch.equal(got, torch.from_numpy(features).to(dtype))

    def test_mapping(self, tmp_path, features, coords):
        path = tmp_path / "a.pt"
        content = {
            "feats": torch.from_numpy(features),
            "coords": torch.from_numpy(coords),
            "patch_size": 512,
            "mpp": 0.5,
        }
        torch.save(content, path)
        file = read_header(path)
        assert (file.unit, file.patch_size, file.pixel_size) == ("px", 512, 0.5)
        np.testing.assert_array_equal(read_bag(file)[1], coords)

    def test_code_is_not_run(self, tmp_path):
        class Evil:
            def __reduce__(self):
                return (open, (str(tmp_path / "pwned"), "w"))

        path = tmp_path / "a.pt"
        path.write_bytes(pickle.dumps(Evil(), protocol=2))
        with pytest.raises(DataError, match=r"a\.pt: expected plain tensors or arrays, .* got an object of io\.open"):
            read_header(path)
        torch.save({"features": torch.zeros(2, 2), "x": Evil()}, path)
        with pytest.raises(DataError, match=r"got an object of io\.open; reading one may run code"):
            read_header(path)
        assert not (tmp_path / "pwned").exists()

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (torch.zeros(3, 4, dtype=torch.int64), "features: expected floating-point numbers, got torch.int64"),
            ({"model": torch.zeros(3, 4)}, "expected a tensor .*got a mapping with model"),
            ([1, 2], "expected a tensor .*got list"),
            ({"features": torch.zeros(3, 4), "coords": torch.zeros(2, 2)}, r"coords: expected \[3, 2\]"),
            ({"features": torch.zeros(3, 4), "coords": [1, 2]}, r"coords: expected a tensor"),
            (
                {"features": torch.zeros(3, 4), "coords": torch.zeros(3, 2), "mpp": 250.0},
                "mpp: expected micrometres per pixel in 0.01..100, got 250",
            ),
        ],
    )
    def test_refused(self, tmp_path, content, message):
        path = tmp_path / "a.pt"
        torch.save(content, path)
        with pytest.raises(DataError, match=r"a\.pt: " + message):
            read_header(path)

    def test_arrays_of_numpy(self, tmp_path, features, coords):
        path = tmp_path / "a.pt"
        torch.save(features.astype(">f4"), path)
        np.testing.assert_array_equal(read_bag(read_header(path))[0], features)
        content = {"features": np.asfortranarray(features), "coords": coords, "mpp": np.float64(0.25)}
        torch.save({**content, "patch_size": np.int64(512)}, path)
        file = read_header(path)
        assert (file.rows, file.pixel_size, file.patch_size) == (70, 0.25, 512)
        got, where = read_bag(file)
        np.testing.assert_array_equal(got, features)
        np.testing.assert_array_equal(where, coords)
        torch.save({"features": np.array(["a"])}, path)
        with pytest.raises(DataError, match=r"a\.pt: "):
            read_header(path)

    def test_objects_are_not_unpickled(self, tmp_path):
        path = tmp_path / "a.pt"
        torch.save({"features": np.array([{}], dtype=object)}, path)
        with pytest.raises(DataError, match=r"a\.pt: expected plain .* got an object of numpy\.dtypes\.ObjectDType"):
            read_header(path)
        torch.save(path, path)
        with pytest.raises(DataError, match=r"got an object of pathlib\.PosixPath; reading one may run code"):
            read_header(path)
        path.write_bytes(b"123")
        with pytest.raises(DataError, match=r"a\.pt: corrupt or truncated: .* got: Unsupported operand 49$"):
            read_header(path)


class TestNpz:
    @pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
    def test_named(self, tmp_path, features, coords, save):
        path = tmp_path / "a.npz"
        save(path, features=features, coords=coords / 2, unit="um", patch_size=256.0)
        file = read_header(path)
        assert (file.rows, file.width, file.unit, file.patch_size) == (70, 6, "um", 256)
        got, where = read_bag(file)
        np.testing.assert_array_equal(got, features)
        np.testing.assert_array_equal(where, coords / 2)

    def test_the_only_matrix(self, tmp_path, features, coords):
        path = tmp_path / "a.npz"
        np.savez(path, embedding=np.asfortranarray(features), coords=coords, slide="a")
        np.testing.assert_array_equal(read_bag(read_header(path))[0], features)

    def test_refused(self, tmp_path, features, coords):
        path = tmp_path / "a.npz"
        np.savez(path, X=features, ptr=[0, 70])
        with pytest.raises(DataError, match=r"a\.npz: expected one bag, got a whole data set"):
            read_header(path)
        np.savez(path, a=features, b=features)
        with pytest.raises(DataError, match=r"a\.npz: expected features"):
            read_header(path)
        np.savez(path, features=features, coords=coords + 0.5)
        with pytest.raises(DataError, match=r"a\.npz: coords: wrong unit: expected whole level-0 pixels"):
            read_bag(read_header(path))
        np.savez(path, features=np.array([[None]]))
        with pytest.raises(DataError, match=r"a\.npz: "):
            read_header(path)


@pytest.mark.parametrize("kind", ["h5", "pt", "npz"])
def test_a_first_axis_of_one_slide(tmp_path, features, coords, kind):
    path = tmp_path / f"a.{kind}"
    content = {"features": features[None], "coords": coords[None]}
    if kind == "h5":
        with h5py.File(path, "w") as file:
            for name, value in content.items():
                file[name] = value
    elif kind == "pt":
        torch.save({name: torch.from_numpy(value) for name, value in content.items()}, path)
    else:
        np.savez(path, **content)
    file = read_header(path)
    assert (file.rows, file.width) == (70, 6)
    got, where = read_bag(file)
    np.testing.assert_array_equal(got, features)
    np.testing.assert_array_equal(where, coords)
    np.testing.assert_array_equal(read_coords(file), coords)
    np.testing.assert_array_equal(np.frombuffer(file.probe[-1], features.dtype), features[0])


def test_a_link_to_nothing(tmp_path):
    (tmp_path / "a.h5").symlink_to(tmp_path / "gone.h5")
    with pytest.raises(DataError, match=r"a\.h5: expected a file, got a link to what is not there"):
        load_source(tmp_path)


def test_a_file_that_is_being_written(tmp_path, features, coords):
    path = write_clam(tmp_path, "a", features, coords, pt=False)
    writing = "import h5py, sys; file = h5py.File(sys.argv[1], 'r+'); print(flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", writing, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as writer:
        assert writer.stdout.readline()
        with pytest.raises(DataError, match=r"a\.h5: still being written: another process has it open; wait"):
            read_header(path)
        writer.communicate(b"")
    assert read_header(path).rows == 70
    path.write_bytes(path.read_bytes()[:200])
    (path.parent / "a.h5.lock").touch()
    with pytest.raises(DataError, match=r"a\.h5: still being written: there is a\.h5\.lock; wait"):
        read_header(path)


@pytest.mark.parametrize("kind", ["clam", "trident", "stamp", "pt", "npz"])
def test_cut_anywhere(tmp_path, features, coords, kind):
    """A file cut at any place is an error that names it, whether the header or the content is hit; never another
    exception, never wrong numbers."""
    path = {
        "clam": lambda: write_clam(tmp_path, "a", features, coords),
        "trident": lambda: write_trident(tmp_path, "a", features, coords),
        "stamp": lambda: write_stamp(tmp_path, "a", features, coords / 2),
        "pt": lambda: torch.save(torch.from_numpy(features), tmp_path / "a.pt"),
        "npz": lambda: np.savez(tmp_path / "a.npz", features=features, coords=coords),
    }[kind]()
    path = path or tmp_path / f"a.{kind}"
    whole = path.read_bytes()
    for cut in (0, 1, 100, *(len(whole) * np.linspace(0.05, 0.999, 25)).astype(int)):
        path.write_bytes(whole[:cut])
        with pytest.raises(DataError, match=str(path)):
            read_bag(read_header(path))


@pytest.mark.parametrize("kind", ["pt", "npz"])
def test_flipped_bytes(tmp_path, features, coords, kind):
    """Whatever bytes a file holds, it is read or it is an error with its name: never another exception.

    Not HDF5: from some such files the library itself does not come back, see test_isolated.py.
    """
    path = tmp_path / f"a.{kind}"
    if kind == "pt":
        torch.save({"features": torch.from_numpy(features)}, path)
    else:
        np.savez(path, features=features, coords=coords)
    whole = path.read_bytes()
    rng = np.random.default_rng(2)
    refused = []
    for _ in range(60):
        broken = bytearray(whole)
        for place in rng.integers(0, min(len(whole), 2048), 4):
            broken[place] = rng.integers(256)
        path.write_bytes(broken)
        try:
            read_bag(read_header(path))
        except DataError as error:
            refused.append(str(error))
    assert refused
    assert all(str(path) in message for message in refused)


def test_a_file_that_changes(tmp_path, features, coords):
    file = read_header(write_clam(tmp_path, "a", features, coords))
    write_clam(tmp_path, "a", features[:50], coords[:50])
    with pytest.raises(DataError, match=r"a\.h5: changed while in use: expected 70 rows of width 6, got 50 of 6"):
        read_bag(file)
