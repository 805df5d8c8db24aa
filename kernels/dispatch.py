"""Which backend runs an op: auto, triton, native or reference.

An op is a folder `kernels/ops/<op>`; a backend of it is the module of that name inside: `reference.py` and, where they
exist, `triton.py` and `native.py` (whose work `native.cpp` does). Each defines the same function. So a backend is added
to an op by adding the module: nothing is registered.

The choice is made when an op is called. Its backward is part of what was chosen, so it does not matter that autograd
runs it in another thread, perhaps after the choice has changed.
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
_FUSED = ("rms_norm", "rotary", "swiglu")  # torch.compile's: 0.99 to 1.08 of the time on an H100, less on its host
_REMEDY = {
    "triton": "install Triton with `pip install 'creche[gpu]'`",
    "native": "install a C++ compiler and reinstall creche with `pip install --no-build-isolation --no-deps .`",
}

_process_default: str | None = None  # None: not chosen by this process, so the environment decides


class backend:
    """Choose the backend of every op, in every thread of the process.

    `backend("reference")` alone sets the process's default. `with backend("reference"):` puts the previous choice back
    at the end of the block. `backend()` chooses nothing; its `.name` is the choice in force.

    Args:
        name: "auto" takes, op by op, Triton for CUDA tensors and the native kernels for CPU tensors where they are
            installed, else the reference. Under torch.compile the reference, which the compiler fuses: of every op
            on a CPU, of rms_norm, rotary and swiglu on a GPU.
            "triton", "native" and "reference" are taken at their word: an op without that backend raises. Until the
            process chooses, the environment variable KERNELS_BACKEND does, else "auto".

    Raises:
        ValueError: an unknown name, or a backend which no op has in this installation.
    """

    def __init__(self, name: str | None = None) -> None:
        global _process_default
        self._before = _process_default
        if name is not None:
            _check(name, source="backend")
            _process_default = name
        self.name = current()

    def __enter__(self) -> "backend":
        return self

    def __exit__(self, *_: object) -> None:
        global _process_default
        _process_default = self._before

    def __repr__(self) -> str:
        return f"backend({self.name!r})"


def current() -> str:
    """The name in force: the process's choice, else KERNELS_BACKEND, else "auto"."""
    return _named(_process_default)


def implementation(op: str, tensor: Tensor) -> ModuleType:
    """The module that runs `op` on the device of `tensor`.

    A compiled function keeps what was chosen when it was traced. It is traced again after `backend(name)`, not after a
    change of the environment.

    Raises:
        ValueError: the backend in force was chosen by name and `op` does not have it.
    """
    if torch.compiler.is_compiling():
        return getattr(getattr(ops, op), _chosen(op, _process_default, tensor.device.type, True))
    return _module(op, _process_default, os.environ.get(ENVIRONMENT), tensor.device.type)


@functools.cache  # every call of every op asks; `environment` is there to be told apart by
def _module(op: str, process_default: str | None, environment: str | None, device: str) -> ModuleType:
    return getattr(getattr(ops, op), _chosen(op, process_default, device, False))


# A tracer follows neither the environment nor imports and searches for modules: it takes the two below as constants.


@constant_when_traced
def _named(process_default: str | None) -> str:
    if process_default is not None:
        return process_default
    name = os.environ.get(ENVIRONMENT, "auto")
    _check(name, source=ENVIRONMENT)
    return name


@constant_when_traced
def _chosen(op: str, process_default: str | None, device: str, compiling: bool) -> str:
    """The backend that runs `op`, imported."""
    name = _named(process_default)
    if name == "auto":
        name = _FASTEST.get(device, "reference")
        if compiling and (name == "native" or op in _FUSED):
            name = "reference"
        elif not _offers(op, name):
            if name == "native":
                _regret_once()
            name = "reference"
    elif not _offers(op, name):
        raise ValueError(f"backend {name!r} has no {op} in this installation: {_REMEDY[name]}, or choose 'auto'")
    importlib.import_module(f"kernels.ops.{op}.{name}")
    return name


@functools.cache
def _check(name: str, source: str) -> None:
    if name not in NAMES:
        raise ValueError(f"{source} is {name!r}: expected one of {', '.join(NAMES)}")
    if name != "auto" and not any(_offers(op.name, name) for op in pkgutil.iter_modules(ops.__path__)):
        raise ValueError(f"{source} is {name!r}, which is not available: {_REMEDY[name]}, or choose 'auto'")


@functools.cache
def _offers(op: str, name: str) -> bool:
    if find_spec(f"kernels.ops.{op}.{name}") is None:
        return False
    if name == "triton":
        return find_spec("triton") is not None
    return name != "native" or native.problem() is None


@functools.cache
def _regret_once() -> None:
    if os.environ.get("RANK", "0") == "0":
        log.warning("kernels: %s, so the slow reference runs on the CPU: %s", native.problem(), _REMEDY["native"])
