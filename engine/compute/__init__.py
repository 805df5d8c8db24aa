"""What a run takes: FLOPs, memory, what has been spent so far, the hardware's limits, and profiles of single steps."""
