"""The training engine: data, students, one loop, checkpoints, reports. Knows kernels only by their public functions."""

import logging
import warnings

# DeepSpeed warns of the CPU it finds itself on, and of steps it skips, which the engine makes it skip and logs itself.
logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
# It calls two collectives by their former names.
warnings.filterwarnings("ignore", r"`torch.distributed.(all_gather_into|reduce_scatter)_tensor` is deprecated")
