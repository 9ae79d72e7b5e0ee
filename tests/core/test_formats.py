"""Files of named arrays and columns, and data frames, as streams: right, or refused by name."""

import sys

import numpy as np
import pytest
from safetensors.numpy import save_file

from ipa_core import (
    ArrayTypeError,
    ExactCovariance,
    FileFormatError,
    MissingDependencyError,
    StreamError,
    fit_projector,
)
from ipa_core.io.streams import iterate

X = np.random.default_rng(0).standard_normal((10_000, 6)).astype("float32")
X *= np.arange(6, 0, -1, dtype="float32")


def moment(stream):
    """Return the second moment of a stream, and its number of rows."""
    total, count = 0.0, 0
    for batch, weights in iterate(stream):
        assert isinstance(batch, np.ndarray) and len(batch) <= 8192
        weighted = batch if weights is None else batch * np.asarray(weights)[:, None]
        total, count = total + weighted.T.astype(float) @ batch, count + len(batch)
    return total, count


def assert_holds(stream, x=X):
    found, count = moment(stream)
    np.testing.assert_allclose(found, x.T.astype(float) @ x, rtol=1e-4, atol=1e-2)
    assert count == len(x)


def save_npz(file, arrays):
    np.savez(file, **arrays)


def save_hdf5(file, arrays):
    h5py = pytest.importorskip("h5py")
    with h5py.File(file, "w") as target:
        for name, array in arrays.items():
            target.create_dataset(name, data=array)


SAVERS = {
    "x.npz": save_npz,
    "x.h5": save_hdf5,
    "x.hdf5": save_hdf5,
    "x.safetensors": lambda file, arrays: save_file(arrays, file),
}


@pytest.mark.parametrize("name", SAVERS)
def test_named_arrays_in_order_or_one_of_them(tmp_path, name):
    file = tmp_path / name
    SAVERS[name](file, {"b": X[9000:], "a": X[:9000]})
    assert_holds(file)
    assert_holds(tmp_path)
    assert_holds(f"{file}#b", X[9000:])
    assert_holds([f"{file}#b", f"{file}#a"])
    with pytest.raises(FileFormatError, match="named 'c', got a, b"):
        list(iterate(f"{file}#c"))


@pytest.mark.parametrize("name", SAVERS)
@pytest.mark.parametrize(
    "beside",
    [np.arange(6), np.ones((3, 6), "int32"), np.ones(6, "float32"), np.array(1.0)],
)
def test_what_is_no_rows_is_refused_by_name(tmp_path, name, beside):
    file = tmp_path / name
    SAVERS[name](file, {"rows": X, "beside": beside})
    with pytest.raises(FileFormatError, match=rf"'beside' to hold.*{name}#NAME"):
        list(iterate(file))
    assert_holds(f"{file}#rows")


def test_float8_is_refused_by_name(tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file as save_torch

    file = tmp_path / "x.safetensors"
    save_torch({"rows": torch.ones(4, 4), "f8": torch.ones(4, 4).to(torch.float8_e4m3fn)}, file)
    with pytest.raises(FileFormatError, match="'f8' to hold"):
        list(iterate(file))
    assert_holds(f"{file}#rows", np.ones((4, 4)))


def test_names_with_slashes_and_marks(tmp_path):
    folder = tmp_path / "a#b"
    folder.mkdir()
    save_hdf5(folder / "x.h5", {"layers/0/input": X[:10], "layers/1/input": X[10:]})
    assert_holds(f"{folder / 'x.h5'}#layers/0/input", X[:10])
    assert_holds(f"{folder / 'x.h5'}#/layers/1/input", X[10:])
    save_file({"x#y": X}, folder / "x.safetensors")
    assert_holds(f"{folder / 'x.safetensors'}#x#y")
    np.save(folder / "c#d.npy", X)
    assert_holds(folder / "c#d.npy")


@pytest.mark.parametrize("name", ["x.npz", "x.h5", "x.parquet", "x.arrow", "x.feather"])
def test_what_is_damaged_or_absent_says_so(tmp_path, name):
    pytest.importorskip({"h5": "h5py"}.get(name[2:], "pyarrow") if name != "x.npz" else "numpy")
    (tmp_path / name).write_bytes(b"no such format, for sure")
    with pytest.raises(FileFormatError, match=name):
        list(iterate(tmp_path / name))
    with pytest.raises(FileNotFoundError):
        list(iterate(tmp_path / f"absent_{name}"))


def test_pickled_arrays_are_refused(tmp_path):
    np.savez(tmp_path / "x.npz", a=np.array([{}], dtype=object))
    with pytest.raises(FileFormatError, match="x.npz"):
        list(iterate(tmp_path / "x.npz"))


def test_other_byte_orders_are_read(tmp_path):
    np.savez(tmp_path / "x.npz", a=X.astype(">f4"))
    assert_holds(tmp_path / "x.npz")
    assert fit_projector(tmp_path / "x.npz", 2, learner=ExactCovariance).samples == len(X)


@pytest.mark.parametrize(
    ("name", "library", "extra"),
    [("x.h5", "h5py", "hdf5"), ("x.parquet", "pyarrow", "arrow"), ("x.arrow", "pyarrow", "arrow")],
)
def test_missing_library_is_named(tmp_path, monkeypatch, name, library, extra):
    monkeypatch.setitem(sys.modules, library, None)
    (tmp_path / name).touch()
    with pytest.raises(MissingDependencyError, match=rf"{library}.*ipa-projectors\[{extra}\]"):
        list(iterate(tmp_path / name))


def test_formats_without_names_take_none(tmp_path):
    np.save(tmp_path / "x.npy", X)
    with pytest.raises(StreamError, match=r"expected a .*x\.npy"):
        list(iterate(f"{tmp_path / 'x.npy'}#a"))


def arrow_table(**columns):
    pyarrow = pytest.importorskip("pyarrow")
    return pyarrow.table(columns)


def write_arrow(file, table):
    if file.suffix == ".parquet":
        pytest.importorskip("pyarrow.parquet").write_table(table, file)
    else:
        pyarrow = pytest.importorskip("pyarrow")
        with (
            pyarrow.OSFile(str(file), "wb") as raw,
            pyarrow.ipc.new_file(raw, table.schema) as sink,
        ):
            sink.write_table(table)


@pytest.mark.parametrize("name", ["x.parquet", "x.arrow", "x.feather"])
def test_columns_are_features_or_lists_are_rows(tmp_path, name):
    pyarrow = pytest.importorskip("pyarrow")
    columns = {f"f{i}": X[:, i] for i in range(6)}
    write_arrow(tmp_path / name, arrow_table(**columns))
    assert_holds(tmp_path / name)
    flat = pyarrow.array(X.reshape(-1))
    lists = pyarrow.FixedSizeListArray.from_arrays(flat, 6)
    ragged = pyarrow.ListArray.from_arrays(np.arange(0, 60_001, 6, dtype="int32"), flat)
    for column in (lists, ragged):
        write_arrow(tmp_path / name, arrow_table(embedding=column))
        assert_holds(tmp_path / name)
        write_arrow(tmp_path / name, arrow_table(id=range(len(X)), embedding=column))
        assert_holds(f"{tmp_path / name}#embedding")
        with pytest.raises(FileFormatError, match=f"'id', got int64.*{name}#NAME"):
            list(iterate(tmp_path / name))
        write_arrow(tmp_path / name, arrow_table(score=X[:, 0], embedding=column))
        with pytest.raises(FileFormatError, match=r"\['score', 'embedding'\]"):
            list(iterate(tmp_path / name))


@pytest.mark.parametrize("name", ["x.parquet", "x.arrow"])
def test_nulls_and_ragged_lists_are_refused_by_column(tmp_path, name):
    pytest.importorskip("pyarrow")
    for column, words in (
        ([1.0, None], "'bad', got double with nulls"),
        ([[1.0, 2.0], [3.0]], "equal length in column 'bad'"),
        ([[1.0, 2.0], None], "equal length in column 'bad'"),
        ([[1.0, 2.0], [None, 1.0]], "'bad', got double with nulls"),
        (["a", "b"], "'bad', got string"),
    ):
        write_arrow(tmp_path / name, arrow_table(bad=column))
        with pytest.raises(FileFormatError, match=words):
            list(iterate(tmp_path / name))


@pytest.mark.parametrize("library", ["pandas", "polars"])
def test_frames_are_rows(library):
    frames = pytest.importorskip(library)
    frame = frames.DataFrame({f"f{i}": X[:, i] for i in range(6)})
    assert_holds(frame)
    assert_holds([frame[:9000], frame[9000:]])
    weights = frames.Series(np.ones(len(X)))
    assert_holds([(frame, weights)])
    mixed = frames.DataFrame({"value": [1.0, 2.0], "id": [1, 2]})
    with pytest.raises(
        ArrayTypeError, match="int64.*'id'" if library == "pandas" else "Int64.*'id'"
    ):
        list(iterate(mixed))
