"""What every room asks of the machine: processes and devices, signals, files, and text for a terminal."""
