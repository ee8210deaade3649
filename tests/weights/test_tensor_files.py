"""Reading tensors one at a time, and noticing damage before anything is read."""

from __future__ import annotations

import gc
import json
import sys
from collections import OrderedDict
from pathlib import Path

import psutil
import pytest
import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import save_file

from tworeel.errors import UserError
from tworeel.weights.tensor_files import TensorFiles, TensorInfo

TENSORS = {
    "a.weight": torch.arange(12.0).reshape(3, 4),
    "b.bias": torch.arange(5).to(torch.bfloat16),
    "c.fp8": torch.tensor([0.5, -2.0]).to(torch.float8_e4m3fn),
    "d.scalar": torch.tensor(7, dtype=torch.int64),
}


def write(path: Path, tensors: dict[str, torch.Tensor] = TENSORS) -> Path:
    if path.suffix == ".safetensors":
        save_file(tensors, path, metadata={"rank": "4"})
    else:
        torch.save(tensors, path)
    return path


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    return left.dtype == right.dtype and torch.equal(left.float(), right.float())


@pytest.mark.parametrize("name", ["x.safetensors", "x.pth", "x.pt", "x.bin"])
def test_names_come_from_headers_and_values_are_exact(tmp_path, name):
    files = TensorFiles(write(tmp_path / name))

    assert files.names == {key: TensorInfo(tuple(t.shape), t.dtype) for key, t in TENSORS.items()}
    assert all(same(files.read(key), tensor) for key, tensor in TENSORS.items())


@pytest.mark.parametrize("key", ["model_state", "state_dict", "module"])
def test_tensors_one_level_down_are_found(tmp_path, key):
    torch.save({key: OrderedDict(TENSORS)}, tmp_path / "x.pth")

    assert set(TensorFiles(tmp_path / "x.pth").names) == set(TENSORS)


def test_a_pickle_in_the_format_from_before_torch_1_6_is_read(tmp_path):
    plain = {"a.weight": TENSORS["a.weight"], "b.bias": TENSORS["b.bias"]}
    torch.save(plain, tmp_path / "x.pth", _use_new_zipfile_serialization=False)

    assert same(TensorFiles(tmp_path / "x.pth").read("a.weight"), TENSORS["a.weight"])


def test_tensors_of_any_size_and_place_in_the_file_are_read(tmp_path):
    shapes = [(0,), (), (3, 0, 2), (1,), (40_000,), (7, 3), (65_536,)]
    tensors = {
        f"{index}{dtype}": torch.randn(shape).to(dtype)
        for index, shape in enumerate(shapes)
        for dtype in (torch.float32, torch.bfloat16, torch.float8_e5m2, torch.uint8)
    }
    files = TensorFiles(write(tmp_path / "x.safetensors", tensors))

    assert all(same(files.read(name), tensor) for name, tensor in tensors.items())


@pytest.mark.skipif(sys.platform != "linux", reason="needs sparse files")
def test_a_file_larger_than_memory_is_read(tmp_path):
    size = 2 * psutil.virtual_memory().total
    header = json.dumps(
        {
            "rest": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]},
            "last": {"dtype": "BF16", "shape": [3], "data_offsets": [size, size + 6]},
        }
    ).encode()
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size + 6)  # sparse: takes no room on the disk

    files = TensorFiles(path)
    assert torch.equal(files.read("last"), torch.zeros(3, dtype=torch.bfloat16))
    assert len(files.fingerprint()) == 64
    path.unlink()


def test_a_header_whose_shapes_and_bytes_differ_is_damage(tmp_path):
    path = write(tmp_path / "x.safetensors")
    path.write_bytes(path.read_bytes().replace(b'"shape":[3,4]', b'"shape":[3,5]'))

    with pytest.raises(UserError, match=r"x\.safetensors: damaged: the bytes of tensor 'a\.weight'"):
        TensorFiles(path)


def test_metadata_is_read(tmp_path):
    assert TensorFiles(write(tmp_path / "x.safetensors")).metadata == {"rank": "4"}


@pytest.mark.parametrize("name", ["x.safetensors", "x.pth"])
def test_no_file_stays_open_or_mapped_after_close(tmp_path, name):
    path = write(tmp_path / name)
    with TensorFiles(path) as files:
        kept = files.read("a.weight")
    gc.collect()

    process = psutil.Process()
    assert str(path) not in [file.path for file in process.open_files()]
    assert str(path) not in [mapping.path for mapping in process.memory_maps()]
    assert same(kept, TENSORS["a.weight"])
    assert same(files.read("b.bias"), TENSORS["b.bias"]), "a later read opens the file again"


def sharded(folder: Path) -> Path:
    save_torch_state_dict(TENSORS, folder, max_shard_size=50, filename_pattern="m{suffix}.safetensors")
    return folder / "m.safetensors.index.json"


def test_shards_are_found_through_their_index(tmp_path):
    index = sharded(tmp_path)
    files = TensorFiles(index)

    assert len(files.paths) > 1
    assert set(files.names) == set(TENSORS)
    assert all(same(files.read(key), tensor) for key, tensor in TENSORS.items())


def test_a_missing_shard_is_named(tmp_path):
    index = sharded(tmp_path)
    gone = TensorFiles(index).paths[0]
    gone.unlink()

    with pytest.raises(UserError, match=f"{gone.name}: missing"):
        TensorFiles(index)


def test_a_tensor_that_only_the_index_knows_is_named(tmp_path):
    index = sharded(tmp_path)
    content = json.loads(index.read_text())
    content["weight_map"]["ghost.weight"] = next(iter(content["weight_map"].values()))
    index.write_text(json.dumps(content))

    with pytest.raises(UserError, match=r"ghost\.weight"):
        TensorFiles(index)


@pytest.mark.parametrize("content", ["{", "[]", '{"weight_map": {}}', '{"weight_map": {"a": 1}}'])
def test_an_unreadable_index_is_named(tmp_path, content):
    (tmp_path / "m.safetensors.index.json").write_text(content)

    with pytest.raises(UserError, match=r"m\.safetensors\.index\.json"):
        TensorFiles(tmp_path / "m.safetensors.index.json")


def test_a_name_in_two_files_is_an_error(tmp_path):
    first, second = write(tmp_path / "x.safetensors"), write(tmp_path / "y.safetensors")

    with pytest.raises(UserError, match=r"y\.safetensors: tensor 'a\.weight' is also in x\.safetensors"):
        TensorFiles(first, second)


def test_a_cut_off_file_is_named_with_its_size_and_the_expected_one(tmp_path):
    path = write(tmp_path / "x.safetensors")
    whole = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-10])

    with pytest.raises(UserError, match=rf"x\.safetensors: .*{whole - 10} bytes found, {whole} expected"):
        TensorFiles(path)


@pytest.mark.parametrize("share", [0.01, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("name", ["x.safetensors", "x.pth"])
def test_a_file_cut_off_anywhere_is_a_users_error(tmp_path, name, share):
    path = write(tmp_path / name)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])

    with pytest.raises(UserError, match=name):
        TensorFiles(path)


@pytest.mark.parametrize("content", [b"", b"\xff" * 100, b"version https://git-lfs.github.com/spec/v1\n"])
@pytest.mark.parametrize("name", ["x.safetensors", "x.pth"])
def test_a_file_without_tensors_is_a_users_error(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)

    with pytest.raises(UserError, match=name):
        TensorFiles(tmp_path / name)


def test_every_bad_file_is_listed(tmp_path):
    (tmp_path / "empty.safetensors").touch()

    with pytest.raises(UserError) as caught:
        TensorFiles(tmp_path / "empty.safetensors", tmp_path / "gone.pth", tmp_path / "x.gguf")
    assert len(caught.value.problems) == 3


@pytest.mark.parametrize("held", [{"a": torch.zeros(1), "epoch": 3}, [torch.zeros(1)], {"a": Path("x")}])
def test_a_pickle_with_something_else_than_tensors_is_refused(tmp_path, held):
    torch.save(held, tmp_path / "x.pth")

    with pytest.raises(UserError, match=r"x\.pth: holds"):
        TensorFiles(tmp_path / "x.pth")


@pytest.mark.parametrize("name", ["x.safetensors", "x.pth"])
def test_the_fingerprint_follows_the_content_and_not_the_name(tmp_path, name):
    path = write(tmp_path / name)
    before = TensorFiles(path).fingerprint()
    moved = path.rename(path.with_name(f"moved_{name}"))
    assert TensorFiles(moved).fingerprint() == before

    changed = {**TENSORS, "a.weight": TENSORS["a.weight"] + 1}
    assert TensorFiles(write(path, changed)).fingerprint() != before
