"""What learns: students in DeepSpeed engines, their loss and gradients, and the outer loop over their weights."""
