"""Files of torch.save that are read, and those that lie or would run code."""

import argparse
import io
import os
import pickle
import resource
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from llama_adapter_kernels.formats.torch_file import TensorRecord, TorchFile


@contextmanager
def little_memory(bytes_more: int = 512 << 20) -> Iterator[None]:
    """No more than so much address space besides what is in use: what a lying file asks for cannot be had quietly."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limit = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + bytes_more, limit[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limit)


def saved(tmp_path: Path, content: object) -> Path:
    torch.save(content, tmp_path / "file.pth")
    return tmp_path / "file.pth"


def with_pickle(tmp_path: Path, content: bytes, **records: bytes) -> Path:
    """A torch archive with this pickle, and records under data/."""
    path = tmp_path / "file.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/version", "3\n")
        for key, data in records.items():
            archive.writestr(f"archive/data/{key.removeprefix('_')}", data)
    return path


def tensor_pickle(storage_length: int, shape: tuple[int, ...], stride: tuple[int, ...], offset: int = 0) -> bytes:
    """{"x": a tensor with these claims}, as torch.save pickles it."""

    class Storage:
        pass

    class Pickler(pickle.Pickler):
        def persistent_id(self, item: object) -> object:
            is_storage = isinstance(item, Storage)
            return ("storage", torch.FloatStorage, "0", "cpu", storage_length) if is_storage else None

    class Tensor:
        def __reduce__(self) -> object:
            return torch._utils._rebuild_tensor_v2, (Storage(), offset, shape, stride, False, OrderedDict())

    stream = io.BytesIO()
    Pickler(stream, protocol=2).dump({"x": Tensor()})
    return stream.getvalue()


def test_tensors_come_back_to_the_bit(tmp_path: Path) -> None:
    kinds = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.bool)
    tensors = {str(dtype): torch.randn(3, 4).to(dtype) for dtype in kinds}
    tensors |= {
        "a view": torch.arange(20.0)[3:15].view(4, 3).T,
        "empty": torch.empty(0, 7),
        "scalar": torch.tensor(2.5),
    }
    tensors["a parameter"] = torch.nn.Parameter(torch.randn(2))
    file = TorchFile(saved(tmp_path, tensors))
    assert file.content["a view"] == TensorRecord((3, 4), torch.float32, file.content["a view"].key)
    found = file.tensors((), tensors)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype and found[name].is_contiguous()


def test_a_trainers_checkpoint_is_read_with_its_settings(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    settings = argparse.Namespace(adapter_len=10, lr=None, blr=9e-3, output_dir="./checkpoint")
    file = TorchFile(
        saved(
            tmp_path,
            {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "epoch": 4,
                "args": settings,
                "scaler": {"scale": 65536.0},
            },
        )
    )
    assert file.content["args"].values == vars(settings)
    assert file.content["epoch"] == 4
    assert torch.equal(file.tensors(("model",), ["weight"])["weight"], model.weight)


class Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("exploded",)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ({"x": Bomb()}, "posix.mkdir"),
        ({"x": torch.zeros(1), "y": torch.nn.Linear(1, 1)}, "torch.nn.modules.linear.Linear"),
        ({"x": bytearray(b"123")}, "bytearray"),
        ({"x": Path("a")}, "pathlib"),
    ],
    ids=["code", "a module", "bytes", "a path"],
)
def test_what_could_run_code_is_refused_by_name(
    tmp_path: Path, content: object, named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=rf"file\.pth: refused: it holds .*{named}"):
        TorchFile(saved(tmp_path, content))
    assert not (tmp_path / "exploded").exists()


def test_torch_reads_with_weights_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path, {"x": torch.zeros(1)})
    calls = []
    load = torch.load
    monkeypatch.setattr(torch, "load", lambda *a, **k: calls.append(k) or load(*a, **k))
    TorchFile(path).tensors((), ["x"])
    assert calls
    assert all(call["weights_only"] is True for call in calls)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (tensor_pickle(10**15, (10**15,), (1,)), "a storage of 4000000000000000 bytes, of which the file has 16"),
        (tensor_pickle(4, (10**12,), (0,)), "a tensor of shape .* in a storage of 4 elements"),
        (tensor_pickle(4, (2, 2), (1, 10**9)), "a tensor that ends at element 1000000001 of 4"),
        (tensor_pickle(4, (2,), (1,), offset=3), "a tensor that ends at element 4 of 4"),
        (tensor_pickle(4, (-2, -2), (1, 1)), "expected a tensor with a shape and strides"),
        (tensor_pickle(4, (1,) * 70, (1,) * 70), "a tensor of shape"),
    ],
    ids=["storage", "repeated", "stride", "offset", "negative", "dimensions"],
)
def test_sizes_are_checked_before_memory_is_taken(tmp_path: Path, content: bytes, message: str) -> None:
    path = with_pickle(tmp_path, content, _0=bytes(16))
    with little_memory(), pytest.raises(ValueError, match=message):
        TorchFile(path)


def test_the_forged_pickles_above_are_otherwise_right(tmp_path: Path) -> None:
    file = TorchFile(with_pickle(tmp_path, tensor_pickle(4, (2, 2), (1, 2)), _0=torch.arange(4.0).numpy().tobytes()))
    assert file.tensors((), ["x"])["x"].tolist() == [[0, 2], [1, 3]]


def nested_tuples(depth: int) -> bytes:
    return b"\x80\x02}(" + b")" + b"\x85" * depth + b"K\x01u."


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x80\x02}(X\x01\x00\x00\x00aK\x01X\x01\x00\x00\x00aK\x02u.", "'a' is there twice"),
        (nested_tuples(1_000_000), "expected names as keys, got a tuple"),
        (
            b"\x80\x02cbuiltins\nbytearray\n\x8a\x06\x00\x00\x00\x00\x00\x01\x85R.",
            "refused: it holds builtins.bytearray",
        ),
        (b"\x80\x02}r\xff\xff\xff\xffX\xff\xff\xff\xffab.", "expected a file of torch.save"),
        (b"\x80\x02}", "expected a file of torch.save"),
        (b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f}.", "expected a file of torch.save"),
        (b"", "expected a file of torch.save"),
        (b"\x80\x02ccollections\nOrderedDict\n]\x85R.", "filled entry by entry"),
        (b"\x80\x02ctorch\nFloatStorage\n}X\x01\x00\x00\x00aK\x01sb.", "expected attributes of a dictionary"),
    ],
    ids=["twice", "deep", "memory", "memo", "open end", "frame", "empty", "pairs", "attributes"],
)
def test_pickles_made_to_harm(tmp_path: Path, content: bytes, message: str) -> None:
    path = with_pickle(tmp_path, content)
    with little_memory(), pytest.raises(ValueError, match=message) as raised:
        TorchFile(path)
    assert len(str(raised.value)) < 600


def test_archives_that_are_none_of_torch(tmp_path: Path) -> None:
    path = tmp_path / "file.pth"
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    with pytest.raises(ValueError, match="Git LFS pointer"):
        TorchFile(path)
    path.write_bytes(pickle.dumps({"x": 1}, protocol=2))
    with pytest.raises(ValueError, match="it is a bare pickle"):
        TorchFile(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"expected a file of torch\.save"):
        TorchFile(path)
    with pytest.raises(FileNotFoundError):
        TorchFile(tmp_path / "absent.pth")
    with pytest.raises(IsADirectoryError, match="expected a file, it is a folder"):
        TorchFile(tmp_path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}.")
        archive.writestr("archive/data/0", bytes(10_000_000))
    with pytest.raises(ValueError, match="expected records that are not compressed"):
        TorchFile(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}.")
        archive.writestr("archive/data.pkx", b"\x80\x02}.")
    path.write_bytes(path.read_bytes().replace(b"data.pkx", b"data.pkl"))
    with pytest.raises(ValueError, match=r"records that are there twice: archive/data\.pkl"):
        TorchFile(path)
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("data.pkl", "constants.pkl"):  # TorchScript
            archive.writestr(f"archive/{name}", b"\x80\x02}.")
    with pytest.raises(ValueError, match=r"with one data\.pkl"):
        TorchFile(path)


def test_a_flipped_bit_in_a_tensor_is_noticed(tmp_path: Path) -> None:
    path = saved(tmp_path, {"x": torch.arange(1000.0), "y": torch.ones(10)})
    content = bytearray(path.read_bytes())
    content[content.find(torch.arange(5.0).numpy().tobytes()) + 9] ^= 4
    path.write_bytes(content)
    file = TorchFile(path)
    assert torch.equal(file.tensors((), ["y"])["y"], torch.ones(10))
    with pytest.raises(ValueError, match=r"file\.pth: damaged, .*data/0"):
        file.tensors((), ["x"])


def test_files_without_check_sums_are_read(tmp_path: Path) -> None:
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        path = saved(tmp_path, {"x": torch.arange(6.0)})
    finally:
        torch.serialization.set_crc32_options(before)
    assert torch.equal(TorchFile(path).tensors((), ["x"])["x"], torch.arange(6.0))
