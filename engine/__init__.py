"""The training engine: data, students, one loop, checkpoints, reports. Knows kernels only by their public functions."""

import importlib.util
import logging
import warnings
from pathlib import Path

_kernels = importlib.util.find_spec("kernels")
if _kernels is None or not (Path(_kernels.origin or "").parent / "dispatch.py").is_file():
    raise ImportError(
        "the package `kernels` that Python finds is not Crèche's but another distribution of that name: run "
        "`pip uninstall kernels`, then install Crèche again"
    )

# DeepSpeed warns of the CPU it finds itself on, and of steps it skips, which the engine makes it skip and logs itself.
logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
# It calls two collectives by their former names.
warnings.filterwarnings("ignore", r"`torch.distributed.(all_gather_into|reduce_scatter)_tensor` is deprecated")
