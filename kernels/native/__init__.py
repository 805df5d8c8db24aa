"""Finds the library of native CPU kernels that fits this processor and this torch, and loads it once.

The installation builds it from `kernels/ops/*/native.cpp` (CMakeLists.txt), once for each instruction set.
"""

import functools
import os
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import torch

ENVIRONMENT = "KERNELS_NATIVE"  # A folder whose libraries replace the installed ones, such as those with a sanitizer.


@functools.cache
def problem() -> str | None:
    """Loads the library, whose ops are then in `torch.ops.creche_native`. Returns None, or one line that says why it
    cannot be loaded.
    """
    instruction_set = torch.backends.cpu.get_cpu_capability().lower()
    version = torch.__version__.split("+")[0]
    names = [f"creche-{version}-{name}.so" for name in dict.fromkeys((instruction_set, "default"))]
    library = next((path for name in names if (path := _folder() / name).exists()), None)
    if library is None:
        built = sorted(path.name for path in _folder().glob("creche-*.so"))
        if built:
            return (
                f"the native kernels were built for other than torch {version}, {instruction_set} ({', '.join(built)})"
            )
        return "the native kernels were not built"
    try:
        torch.ops.load_library(library)
    except OSError as error:
        return f"the native kernels do not load: {error}"
    return None


def _folder() -> Path:
    if folder := os.environ.get(ENVIRONMENT):
        return Path(folder)
    try:
        # The library is not always beside this file: an editable installation builds outside the source tree.
        return Path(str(distribution("creche").locate_file("kernels/native")))
    except PackageNotFoundError:
        return Path(__file__).parent
