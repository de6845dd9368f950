"""Reading other libraries' files, without running anything that is in them."""

from __future__ import annotations

import json
import math
import pickle
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from framework.errors import ModelError

__all__ = ["read_weights"]

CONTAINERS = ("state_dict", "model_state_dict", "model", "module")
"""Keys under which training scripts keep the tensors, beside other things."""

NPY_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}

DAMAGE = (
    SafetensorError,
    zipfile.BadZipFile,
    zlib.error,
    pickle.UnpicklingError,
    ValueError,
    OSError,
    EOFError,
    # files that are well-formed and of another content, such as an index without `weight_map`
    KeyError,
    TypeError,
    AttributeError,
    MemoryError,  # a header that asks for more than there is
)
"""What a reader raises for a file that is damaged or of another kind."""


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a file or folder, by name, in float32.

    Reads `.safetensors`, `.npz`, PyTorch's files (`.bin`, `.pt`, `.pth`; nothing but tensors and plain values
    is loaded from them), and folders with `model.safetensors` or its index of several files.

    Errors:
        ModelError: no such file, a file of another kind, or one that is damaged.
    """
    try:
        if path.is_dir():
            return _read_folder(path)
        if not path.is_file():
            raise ModelError(f"{path}: there is no such file or folder")
        if path.stat().st_size == 0:
            raise ModelError(f"{path}: the file is empty; was it downloaded completely?")
        if path.suffix == ".safetensors":
            return _read_safetensors(path)
        return _read_npz(path) if path.suffix == ".npz" else _read_torch(path)
    except DAMAGE as error:
        raise ModelError(f"{path}: cannot be read as weights ({_first_line(error)})") from error


def _read_folder(folder: Path) -> dict[str, Tensor]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        parts = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        if any(Path(part).name != part for part in parts):
            raise ModelError(f"{index}: names a file outside of its folder")
        tensors: dict[str, Tensor] = {}
        for part in parts:
            tensors |= _read_safetensors(folder / part)
        return tensors
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return read_weights(folder / name)
    raise ModelError(f"{folder}: has neither model.safetensors nor pytorch_model.bin; name the file itself")


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    with safe_open(path, framework="pt") as file:
        return {name: _plain(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118 - no mapping


def _read_npz(path: Path) -> dict[str, Tensor]:
    _check_declared(path)
    with np.load(path, allow_pickle=False) as arrays:
        return {name: _plain(torch.from_numpy(np.asarray(arrays[name]))) for name in arrays.files}


def _check_declared(path: Path) -> None:
    """Refuse arrays whose headers declare another size than the archive holds, before memory is taken."""
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            with archive.open(member) as file:
                header = NPY_HEADERS[np.lib.format.read_magic(file)]
                shape, _, dtype = header(file)
                declared = math.prod(shape) * dtype.itemsize + file.tell()
            if not dtype.hasobject and declared != member.file_size:
                raise ValueError(f"{member.filename} declares {declared} bytes and has {member.file_size}")


def _read_torch(path: Path) -> dict[str, Tensor]:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected pickle protocol")  # what matters is said below
            content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, MemoryError) as error:  # of the file system, and of torch's archive reader
        raise ModelError(f"{path}: cannot be read as weights ({_first_line(error)})") from error
    except Exception as error:  # torch's unpickler raises all kinds of errors for bytes that are no pickle;
        # for a pickle of other things it would advise to load it all the same, and to run its code
        raise ModelError(
            f"{path}: is no PyTorch file, or holds more than tensors and plain values, which is never "
            "loaded; ask its authors for .safetensors"
        ) from error
    for key in CONTAINERS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    tensors = (
        {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
        if isinstance(content, dict)
        else {}
    )
    if not tensors:
        raise ModelError(f"{path}: holds no tensors by name; give a file of a state dict")
    return {name.removeprefix("module."): _plain(value) for name, value in tensors.items()}


def _plain(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:300] or type(error).__name__
