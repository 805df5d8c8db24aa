"""What a run shows: its records, metrics.jsonl and TensorBoard, the progress display, and report.html."""
