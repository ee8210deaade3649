"""Weights go straight to their device, one at a time, or nothing is read at all."""

from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from accelerate import init_empty_weights
from safetensors.torch import save_file
from torch import nn

from tworeel.errors import UserError
from tworeel.weights.loading import load_weights
from tworeel.weights.rows import Rows
from tworeel.weights.tensor_files import TensorFiles

CPU, META = torch.device("cpu"), torch.device("meta")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4, 3) for _ in range(3))
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("table", torch.arange(5.0), persistent=False)


def empty() -> Net:
    with init_empty_weights(include_buffers=False):
        return Net()


def write(path: Path, tensors: dict[str, torch.Tensor] | None = None) -> TensorFiles:
    save_file(Net().state_dict() if tensors is None else tensors, path)
    return TensorFiles(path)


def load(net: nn.Module, files: TensorFiles, **changes) -> None:
    options = {"device_of": lambda name: CPU, "dtype_of": lambda name: torch.float32}
    load_weights(net, files, changes.pop("name_of", lambda key: key), **{**options, **changes})


def test_every_tensor_arrives_exactly_and_frozen(tmp_path):
    torch.manual_seed(0)
    source = Net()
    net = empty()
    load(net, write(tmp_path / "x.safetensors", source.state_dict()))

    assert all(torch.equal(net.state_dict()[name], tensor) for name, tensor in source.state_dict().items())
    assert torch.equal(net.table, source.table)
    assert not any(parameter.requires_grad for parameter in net.parameters())


class Doubling(nn.Linear):
    """Keeps its tensors twice as large as they come."""

    def accept(self, name: str, tensor: torch.Tensor) -> None:
        self.register_parameter(name, nn.Parameter(2 * tensor, requires_grad=False))
        self.register_buffer(f"largest_{name}", tensor.max(), persistent=False)


def test_what_a_module_makes_of_its_tensors_is_made_where_that_is_asked_for(tmp_path):
    """And then waits elsewhere; here on the meta device, which can make nothing."""
    files, net = write(tmp_path / "x.safetensors"), empty()
    with init_empty_weights(include_buffers=False):
        net.blocks[0] = Doubling(4, 3)
    on = {}

    def accepted_on(name: str) -> torch.device:
        on[name] = CPU
        return CPU

    load(net, files, device_of=lambda name: META if "blocks.0" in name else CPU, accepted_on=accepted_on)
    assert on.keys() == {"blocks.0.weight", "blocks.0.bias"}
    assert net.blocks[0].weight.is_meta and net.blocks[0].bias.is_meta
    assert not net.blocks[1].weight.is_meta


def test_each_tensor_goes_to_its_own_device_in_its_own_dtype(tmp_path):
    net = empty()
    load(
        net,
        write(tmp_path / "x.safetensors"),
        device_of=lambda name: CPU if name.startswith("blocks.1.") else META,
        dtype_of=lambda name: torch.bfloat16 if name.endswith("weight") else torch.float32,
    )

    tensors = [*net.named_parameters(), *net.named_buffers()]
    on_cpu = [name for name, tensor in tensors if tensor.device == CPU]
    assert on_cpu == ["blocks.1.weight", "blocks.1.bias"]
    assert net.blocks[1].weight.dtype == torch.bfloat16
    assert net.blocks[1].bias.dtype == torch.float32
    assert net.table.device == META


def test_every_mismatch_is_listed_before_anything_is_read(tmp_path, monkeypatch):
    tensors = Net().state_dict()
    del tensors["blocks.0.weight"]
    tensors["blocks.1.weight"] = torch.zeros(3, 5)
    tensors["blocks.2.bias"] = torch.zeros(3, dtype=torch.int8)
    tensors["stranger"] = torch.zeros(1)
    files = write(tmp_path / "x.safetensors", tensors)
    monkeypatch.setattr(TensorFiles, "read", lambda *_: pytest.fail("a tensor was read"))

    with pytest.raises(UserError) as caught:
        load(empty(), files)

    missing, unknown, misshaped, integer = caught.value.problems
    assert "1 tensors missing" in missing and "'blocks.0.weight'" in missing
    assert "'stranger'" in unknown
    assert "(3, 5)" in misshaped and "(3, 4)" in misshaped and "'blocks.1.weight'" in misshaped
    assert "'blocks.2.bias' (torch.int8)" in integer
    assert all("x.safetensors" in problem for problem in caught.value.problems)


def test_long_lists_are_shortened(tmp_path):
    files = write(
        tmp_path / "x.safetensors", Net().state_dict() | {f"s{i:02}": torch.zeros(1) for i in range(25)}
    )

    with pytest.raises(UserError, match=r"25 tensors in the files but not in the model.*'s09', and 15 more"):
        load(empty(), files)


def test_two_keys_for_one_parameter_are_an_error(tmp_path):
    files = write(tmp_path / "x.safetensors", Net().state_dict() | {"blocks.0.weights": torch.zeros(3, 4)})

    with pytest.raises(UserError, match=r"are both 'blocks\.0\.weight'"):
        load(empty(), files, name_of=lambda key: key.replace("weights", "weight"))


def test_keys_can_be_renamed_and_left_out(tmp_path):
    tensors = {f"model.{name}": tensor for name, tensor in Net().state_dict().items()} | {"x": torch.zeros(1)}
    net = empty()
    load(
        net,
        write(tmp_path / "x.safetensors", tensors),
        name_of=lambda key: key.removeprefix("model.") if key.startswith("model.") else None,
    )

    assert torch.equal(net.blocks[2].weight, tensors["model.blocks.2.weight"])


def test_parameters_that_share_a_tensor_keep_sharing_it(tmp_path):
    with init_empty_weights():
        net = nn.ModuleDict({"shared": nn.Linear(4, 3), "head": nn.Linear(4, 3)})
        net["head"] = net["shared"]
    load(net, write(tmp_path / "x.safetensors", nn.ModuleDict({"shared": nn.Linear(4, 3)}).state_dict()))

    assert net["head"].weight is net["shared"].weight
    assert net["head"].weight.device == CPU


def test_no_file_stays_open_or_mapped(tmp_path):
    path = tmp_path / "x.pth"
    torch.save(Net().state_dict(), path)
    net = empty()
    load(net, TensorFiles(path))
    gc.collect()

    process = psutil.Process()
    assert str(path) not in [file.path for file in process.open_files()]
    assert str(path) not in [mapping.path for mapping in process.memory_maps()]


# Samples the process's anonymous memory while it loads 12 tensors of 16 MiB, all but one of them to meta.
MEASURE = """
import pathlib, sys, threading, torch
from accelerate import init_empty_weights
from torch import nn
from tworeel.weights.loading import load_weights
from tworeel.weights.tensor_files import TensorFiles
with init_empty_weights():
    net = nn.ModuleList(nn.Linear(4096, 2048, bias=False) for _ in range(12))
peak, done, status = 0, threading.Event(), pathlib.Path("/proc/self/status")
def anonymous():
    return int(status.read_text().split("RssAnon:")[1].split()[0]) / 1024
def watch():
    global peak
    while not done.is_set():
        peak = max(peak, anonymous())
files = TensorFiles(sys.argv[1])
before = anonymous()
watcher = threading.Thread(target=watch)
watcher.start()
load_weights(net, files, lambda key: key, dtype_of=lambda name: torch.bfloat16,
             device_of=lambda name: torch.device("cpu" if name.startswith("5.") else "meta"))
done.set()
watcher.join()
print((peak - before) / 16)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="anonymous memory is read from /proc")
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_host_memory_holds_a_few_tensors_and_never_the_file(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    tensors = {f"{i}.weight": torch.full((2048, 4096), i, dtype=torch.bfloat16) for i in range(12)}
    if suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path)
    del tensors

    command = [sys.executable, "-c", MEASURE, str(path)]
    measured = subprocess.run(command, capture_output=True, text=True, check=True)
    path.unlink()

    # In tensors: only the one that stays, and half of one for the interpreter.
    assert 0.5 < float(measured.stdout) < 1.5


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v, self.ends = (nn.Linear(4, 6, bias=False) for _ in range(4))


def fused(key: str) -> tuple[Rows, ...]:
    """A file that fuses query, key and value, and has the halves of `ends` the other way round."""
    if key == "qkv.weight":
        return tuple(Rows(f"to_{name}.weight", (i,), of=3) for i, name in enumerate("qkv"))
    return (Rows("ends.weight", (1, 0), of=2),)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_rows_of_one_tensor_fill_several_parameters(tmp_path, suffix):
    qkv, ends = torch.randn(18, 4), torch.randn(6, 4)
    path = tmp_path / f"x{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)({"qkv.weight": qkv, "ends.weight": ends}, path)
    net = Attention().to_empty(device="meta")
    load(net, TensorFiles(path), name_of=fused)

    assert torch.equal(torch.cat([net.to_q.weight, net.to_k.weight, net.to_v.weight]), qkv)
    assert torch.equal(net.ends.weight, torch.cat([ends[3:], ends[:3]]))


@pytest.mark.parametrize("scales", [1, 18])
def test_rows_of_an_fp8_tensor_take_the_scales_of_their_rows(tmp_path, scales):
    qkv, scale = torch.randn(18, 4).to(torch.float8_e4m3fn), torch.rand(scales, 1) + 0.5
    tensors = {"qkv.weight": qkv, "qkv.weight_scale": scale.squeeze(), "ends.weight": torch.randn(6, 4)}
    net = Attention().to_empty(device="meta")
    load(net, write(tmp_path / "x.safetensors", tensors), name_of=fused)

    assert torch.equal(torch.cat([net.to_q.weight, net.to_k.weight, net.to_v.weight]), qkv.float() * scale)


def test_a_tensor_that_has_no_such_parts_is_named(tmp_path):
    files = write(
        tmp_path / "x.safetensors", {"qkv.weight": torch.zeros(19, 4), "ends.weight": torch.zeros(6, 4)}
    )

    with pytest.raises(UserError) as caught:
        load(Attention().to_empty(device="meta"), files, name_of=fused)
    assert "'qkv.weight' (which holds 'to_q.weight') is (19, 4), the model has (6, 4)" in str(caught.value)
