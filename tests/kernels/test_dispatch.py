import importlib
import subprocess
import sys
import threading
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch

import kernels
from kernels import dispatch

X = torch.ones(2, 4)


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """Each test begins without a choice and with empty caches."""
    monkeypatch.setattr(dispatch, "_process_default", None)
    monkeypatch.delenv(dispatch.ENVIRONMENT, raising=False)
    for cached in (dispatch._check_name, dispatch._is_available, dispatch._module):
        cached.cache_clear()
    yield
    for cached in (dispatch._check_name, dispatch._is_available, dispatch._module):
        cached.cache_clear()


@pytest.fixture
def native_swiglu(monkeypatch):
    """Replaces the native swiglu by one that returns its gate, as if its extension had been built."""
    module = ModuleType("kernels.ops.swiglu.native")
    module.__spec__ = ModuleSpec(module.__name__, None)
    module.__dict__["swiglu"] = lambda gate, up: gate
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(importlib.import_module("kernels.ops.swiglu"), "native", module, raising=False)


def test_a_plain_call_sets_the_process_default_in_every_thread():
    kernels.backend("reference")
    seen = []
    thread = threading.Thread(target=lambda: seen.append(kernels.backend().name))
    thread.start()
    thread.join()
    assert seen == ["reference"]
    assert repr(kernels.backend()) == "backend('reference')"


def test_a_block_puts_the_previous_choice_back():
    with kernels.backend("reference") as chosen:
        assert chosen.name == kernels.backend().name == "reference"
        with kernels.backend("auto"):
            assert kernels.backend().name == "auto"
        assert kernels.backend().name == "reference"
    assert kernels.backend().name == "auto"


def test_the_environment_decides_until_the_process_does(monkeypatch):
    monkeypatch.setenv("KERNELS_BACKEND", "reference")
    assert kernels.backend().name == "reference"
    kernels.backend("auto")
    assert kernels.backend().name == "auto"


def test_an_unknown_name(monkeypatch):
    with pytest.raises(ValueError, match="backend is 'cuda': expected one of auto, triton, native, reference"):
        kernels.backend("cuda")
    assert kernels.backend().name == "auto"
    monkeypatch.setenv("KERNELS_BACKEND", "fast")
    with pytest.raises(ValueError, match="KERNELS_BACKEND is 'fast'"):
        kernels.swiglu(X, X)


@pytest.mark.parametrize(
    ("name", "remedy"), [("triton", r"pip install 'creche\[gpu\]'"), ("native", r"C\+\+ compiler")]
)
def test_a_backend_that_is_not_installed(name, remedy, monkeypatch):
    find_spec = dispatch.find_spec
    absent = (name, f".{name}")
    monkeypatch.setattr(dispatch, "find_spec", lambda module: None if module.endswith(absent) else find_spec(module))
    with pytest.raises(ValueError, match=f"backend is '{name}', which is not available: .*{remedy}"):
        kernels.backend(name)
    assert torch.equal(kernels.swiglu(X, X), kernels.swiglu(X, X))  # "auto" takes an available backend.


def test_auto_takes_the_native_kernel_of_an_op_that_has_one(native_swiglu):
    assert torch.equal(kernels.swiglu(X, X), X)
    with kernels.backend("reference"):
        assert not torch.equal(kernels.swiglu(X, X), X)


def test_a_backend_chosen_by_name_raises_for_an_op_without_it(native_swiglu, monkeypatch):
    find_spec = dispatch.find_spec
    monkeypatch.setattr(
        dispatch, "find_spec", lambda module: None if module == "kernels.ops.rms_norm.native" else find_spec(module)
    )
    with kernels.backend("native"):
        assert torch.equal(kernels.swiglu(X, X), X)
        with pytest.raises(ValueError, match="backend 'native' has no rms_norm in this installation"):
            kernels.rms_norm(X, torch.ones(4))


def test_auto_leaves_to_a_compiler_what_it_fuses_as_well():
    chosen = {op: dispatch._select(op, None, "cuda", True) for op in ("rms_norm", "linear_ensemble_kl")}
    assert chosen == {"rms_norm": "reference", "linear_ensemble_kl": "triton"}
    assert dispatch._select("rms_norm", None, "cuda", False) == "triton"
    assert dispatch._select("rms_norm", "triton", "cuda", True) == "triton", (
        "a backend chosen by name is taken literally"
    )
    assert dispatch._select("linear_ensemble_kl", None, "cpu", True) == "reference"


def test_importing_the_kernels_imports_no_compiler():
    """Importing the compiler takes two seconds, and most processes compile nothing."""
    finished = subprocess.run(
        [sys.executable, "-c", "import kernels, sys; print('torch._dynamo' in sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert finished.stdout == "False\n"
