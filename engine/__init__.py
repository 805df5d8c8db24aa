"""The training engine: data, students, one loop, checkpoints, reports. Knows kernels only by their public functions."""
