"""Chooses the backend that runs an op: auto, triton, native or reference.

The backends of an op are modules of the folder `kernels/ops/<op>`: `reference.py` and, where they exist, `triton.py`
and `native.py`. Each defines the same function. The backend is chosen when an op is called, for its backward pass too.
"""

import functools
import importlib
import logging
import os
import pkgutil
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

from kernels import native, ops
from kernels.registration import constant_when_traced

NAMES = ("auto", "triton", "native", "reference")
ENVIRONMENT = "KERNELS_BACKEND"

log = logging.getLogger(__name__)

_FASTEST = {"cuda": "triton", "cpu": "native"}
# For these torch.compile's own code is as fast as our kernels: 0.99 to 1.08 of their time on an H100, with less work
# for the host.
_COMPILER_IS_AS_FAST = ("rms_norm", "rotary", "swiglu")
_INSTALL = {
    "triton": "install Triton with `pip install 'creche[gpu]'`",
    "native": "install a C++ compiler and reinstall creche with `pip install --no-build-isolation --no-deps .`",
}

_process_default: str | None = None  # None: the environment decides.


class backend:
    """Chooses the backend of every op, in every thread of the process.

    `backend("reference")` alone sets the process's default. `with backend("reference"):` restores the previous choice
    at the end of the block. `backend()` changes nothing; its `.name` is the current choice.

    Args:
        name: "auto" takes, for each op, Triton for CUDA tensors and the native kernels for CPU tensors where they are
            installed, and else the reference. Under torch.compile it takes the reference, which the compiler fuses,
            for every op on a CPU and for rms_norm, rotary and swiglu on a GPU.
            "triton", "native" and "reference" are taken literally: an op without that backend raises. Until the process
            chooses, the environment variable KERNELS_BACKEND decides, and without it the choice is "auto".

    Raises:
        ValueError: The name is unknown, or no op has this backend in this installation.
    """

    def __init__(self, name: str | None = None) -> None:
        global _process_default
        self._previous = _process_default
        if name is not None:
            _check_name(name, source="backend")
            _process_default = name
        self.name = current()

    def __enter__(self) -> "backend":
        return self

    def __exit__(self, *_: object) -> None:
        global _process_default
        _process_default = self._previous

    def __repr__(self) -> str:
        return f"backend({self.name!r})"


def current() -> str:
    """Returns the current choice: the process's, else that of KERNELS_BACKEND, else "auto"."""
    return _resolve(_process_default)


def implementation(op: str, tensor: Tensor) -> ModuleType:
    """Returns the module that runs `op` on the device of `tensor`.

    A compiled function keeps the backend that was chosen when it was traced. It is traced again after `backend(name)`,
    but not after a change of the environment.

    Raises:
        ValueError: The current backend was chosen by name and `op` does not have it.
    """
    if torch.compiler.is_compiling():
        return getattr(getattr(ops, op), _select(op, _process_default, tensor.device.type, True))
    return _module(op, _process_default, os.environ.get(ENVIRONMENT), tensor.device.type)


@functools.cache  # Every call of every op comes here. `environment` is a parameter so that it is part of the cache key.
def _module(op: str, process_default: str | None, environment: str | None, device: str) -> ModuleType:
    return getattr(getattr(ops, op), _select(op, process_default, device, False))


# A tracer cannot follow reads of the environment, imports or searches for modules: it takes these two as constants.


@constant_when_traced
def _resolve(process_default: str | None) -> str:
    if process_default is not None:
        return process_default
    name = os.environ.get(ENVIRONMENT, "auto")
    _check_name(name, source=ENVIRONMENT)
    return name


@constant_when_traced
def _select(op: str, process_default: str | None, device: str, compiling: bool) -> str:
    """Returns the name of the backend that runs `op`, and imports its module."""
    name = _resolve(process_default)
    if name == "auto":
        name = _FASTEST.get(device, "reference")
        if compiling and (name == "native" or op in _COMPILER_IS_AS_FAST):
            name = "reference"
        elif not _is_available(op, name):
            if name == "native":
                _warn_without_native()
            name = "reference"
    elif not _is_available(op, name):
        raise ValueError(f"backend {name!r} has no {op} in this installation: {_INSTALL[name]}, or choose 'auto'")
    importlib.import_module(f"kernels.ops.{op}.{name}")
    return name


@functools.cache
def _check_name(name: str, source: str) -> None:
    if name not in NAMES:
        raise ValueError(f"{source} is {name!r}: expected one of {', '.join(NAMES)}")
    if name != "auto" and not any(_is_available(op.name, name) for op in pkgutil.iter_modules(ops.__path__)):
        raise ValueError(f"{source} is {name!r}, which is not available: {_INSTALL[name]}, or choose 'auto'")


@functools.cache
def _is_available(op: str, name: str) -> bool:
    if find_spec(f"kernels.ops.{op}.{name}") is None:
        return False
    if name == "triton":
        return find_spec("triton") is not None
    return name != "native" or native.problem() is None


@functools.cache  # So that it warns once.
def _warn_without_native() -> None:
    if os.environ.get("RANK", "0") == "0":
        log.warning("kernels: %s, so the slow reference runs on the CPU: %s", native.problem(), _INSTALL["native"])
