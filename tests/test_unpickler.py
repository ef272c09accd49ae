"""Foreign files are read as data: what a pickle or a torch file asks to call is never called."""

import collections
import io
import os
import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from detector.convert.read import read_foreign
from detector.convert.unpickler import PlainUnpickler, load_plain

ARRAYS = {
    "float": np.arange(6, dtype=np.float32).reshape(2, 3),
    "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "transposed": np.arange(24, dtype=np.int64).reshape(2, 3, 4).transpose(2, 0, 1),
    "big_endian": np.arange(3, dtype=">i4"),
    "half": np.ones((1, 2), np.float16),
    "bool": np.array([True, False]),
    "bytes": np.arange(256, dtype=np.uint8),
    "empty": np.zeros((0, 4), np.float32),
    "scalar": np.float64(0.5),
    "no_dimension": np.array(3.0),
}


def call(function, *arguments):
    """An object that calls `function` when an ordinary unpickler reads it."""
    return type("Call", (), {"__reduce__": lambda self: (function, arguments)})()


@pytest.mark.parametrize("protocol", range(6))
def test_arrays_come_back_as_numpy_reads_them(tmp_path, protocol):
    content = {"model": collections.OrderedDict(ARRAYS), "__author__": "someone", "list": [1, (2.5, None)]}
    path = tmp_path / "file.pkl"
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    loaded = load_plain(path)
    assert loaded["__author__"] == "someone" and loaded["list"] == [1, (2.5, None)]
    assert loaded["model"].keys() == ARRAYS.keys()
    for name, wanted in ARRAYS.items():
        got = loaded["model"][name]
        assert got.dtype == np.asarray(wanted).dtype and got.shape == np.shape(wanted)
        assert np.array_equal(got, wanted)


def test_an_array_that_python_2_pickled_is_read(tmp_path):
    numbers = np.array([1.5, -2.0], dtype="<f4")
    pickled = (
        b"\x80\x02}U\x01wcnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        b"(K\x01K\x02\x85cnumpy\ndtype\nU\x02f4K\x00K\x01\x87R(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        b"\x89U\x08" + numbers.tobytes() + b"tbs."
    )
    (tmp_path / "old.pkl").write_bytes(pickled)
    assert load_plain(tmp_path / "old.pkl")["w"].tolist() == [1.5, -2.0]


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("suffix", [".pkl", ".pth"])
def test_a_malicious_pickle_is_refused_by_name_and_does_not_run(tmp_path, protocol, suffix):
    canary = tmp_path / "canary"
    content = {"model": {"w": np.zeros(2)}, "trap": call(os.system, f"touch {canary}")}
    path = tmp_path / f"trap{suffix}"
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    if protocol or suffix == ".pkl":
        with pytest.raises(ValueError, match=r"asks for \w+\.system, which is never run"):
            read_foreign(path)
    else:  # it begins as a text does
        with pytest.raises(ValueError, match="neither a torch file nor a pickle"):
            read_foreign(path)
    assert not canary.exists()
    pickle.loads(path.read_bytes())  # the trap is a real one
    assert canary.exists()


@pytest.mark.parametrize("is_zip", [True, False])
def test_a_malicious_torch_file_is_refused_by_name_and_does_not_run(tmp_path, is_zip):
    canary = tmp_path / "canary"
    content = {"model": {"w": torch.zeros(2)}, "trap": call(os.system, f"touch {canary}")}
    torch.save(content, tmp_path / "trap.pth", _use_new_zipfile_serialization=is_zip)
    with pytest.raises(ValueError, match=r"asks for \w+\.system, which is never run") as caught:
        read_foreign(tmp_path / "trap.pth")
    assert "\n" not in str(caught.value) and not canary.exists()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("builtins", "eval"),
        ("builtins", "getattr"),
        ("numpy", "load"),
        ("numpy.core.multiarray", "_reconstruct.__globals__"),
        ("collections", "OrderedDict.__init__"),
        ("torch._utils", "_rebuild_tensor_v2"),
    ],
)
def test_no_other_name_is_looked_up(module, name):
    pickled = b"\x80\x04\x8c" + bytes([len(module)]) + module.encode()
    pickled += b"\x8c" + bytes([len(name)]) + name.encode() + b"\x93."
    with pytest.raises(pickle.UnpicklingError, match=f"asks for {module}.{name}"):
        PlainUnpickler(io.BytesIO(pickled)).load()


def test_arrays_of_objects_and_of_wrong_length_are_refused(tmp_path):
    path = tmp_path / "objects.pkl"
    path.write_bytes(pickle.dumps({"w": np.array([{}, None], dtype=object)}))
    with pytest.raises(ValueError, match=r"no file of tensors: an array holds 'O8', no plain numbers"):
        read_foreign(path)
    short = pickle.dumps({"w": np.zeros(300, np.float32)}, protocol=2).replace(b"M\x2c\x01", b"M\x2c\x02")
    path.write_bytes(short)
    with pytest.raises(ValueError, match=r"an array of shape \(556,\) does not hold as many numbers"):
        read_foreign(path)


def test_a_dictionary_that_holds_itself_ends(tmp_path):
    content = {"model": {"w": np.ones(2)}}
    content["again"] = content
    (tmp_path / "loop.pkl").write_bytes(pickle.dumps(content))
    assert load_plain(tmp_path / "loop.pkl")["again"]["again"]["model"]["w"].tolist() == [1, 1]


@pytest.fixture
def files(tmp_path):
    """The same tensors as a pickle, as both kinds of torch file, and as safetensors."""
    tensors = {"a.weight": torch.arange(4.0), "count": torch.tensor(3)}
    torch.save({"model": tensors, "iteration": 7}, tmp_path / "zip.pth")
    torch.save({"state_dict": tensors}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    arrays = {name: value.numpy() for name, value in tensors.items()}
    (tmp_path / "zoo.pkl").write_bytes(pickle.dumps({"model": arrays, "__author__": "someone"}))
    blobs = {**arrays, "a.weight_momentum": np.zeros(4), "note": "text"}
    (tmp_path / "blobs.pkl").write_bytes(pickle.dumps({"blobs": blobs}))
    torch.save({f"module.{name}": value for name, value in tensors.items()}, tmp_path / "wrapped.pth")
    torch.save({"model": tensors}, tmp_path / "torch_file.pkl")
    save_file(tensors, tmp_path / "plain.safetensors")
    return tmp_path, tensors


@pytest.mark.parametrize(
    "name",
    ["zip.pth", "old.pth", "zoo.pkl", "blobs.pkl", "wrapped.pth", "torch_file.pkl", "plain.safetensors"],
)
def test_every_kind_of_file_gives_the_tensors_by_name(files, name):
    folder, tensors = files
    read = read_foreign(folder / name)
    assert read.tensors.keys() == tensors.keys()
    assert all(torch.equal(read.tensors[key], value) for key, value in tensors.items())
    assert read.rest == {"zip.pth": {"iteration": 7}, "zoo.pkl": {"__author__": "someone"}}.get(name, {})


@pytest.mark.parametrize("name", ["zip.pth", "old.pth", "zoo.pkl", "plain.safetensors"])
@pytest.mark.parametrize("part", [0.1, 0.5, 0.95])
def test_a_file_cut_short_is_one_sentence(files, name, part):
    folder, _ = files
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: int(len(data) * part)])
    with pytest.raises(ValueError, match=f"{name} is damaged, cut short, or no file of tensors: ") as caught:
        read_foreign(folder / name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "text.pth",
            b"not a checkpoint\n",
            r"neither a torch file nor a pickle.*begins with b'not a checkp'",
        ),
        ("text.pkl", b"not a checkpoint\n", "text.pkl is damaged, cut short, or no file of tensors"),
        ("empty.pth", b"", "begins with b''"),
        ("empty.pkl", b"", "empty.pkl is damaged, cut short, or no file of tensors"),
        ("list.pkl", pickle.dumps([1, 2]), "holds list, no dictionary of tensors"),
        ("words.pkl", pickle.dumps({"a": "b"}), "holds no tensors; its entries: a"),
    ],
)
def test_what_is_no_checkpoint_is_one_sentence(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_foreign(tmp_path / name)
    assert "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        read_foreign(tmp_path / "gone.pkl")
    with pytest.raises(ValueError, match="is a folder"):
        read_foreign(tmp_path)
