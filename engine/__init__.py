"""The training engine: data, students, one loop, checkpoints, reports. Knows kernels only by their public functions."""

import logging
import warnings

# DeepSpeed warns of the CPU it finds itself on, and of steps it skips, which the engine makes it skip and logs itself.
logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
# It calls a collective by its former name.
warnings.filterwarnings("ignore", message=r".*all_gather_into_tensor.* is deprecated", category=FutureWarning)
