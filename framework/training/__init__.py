"""Training: the loop, the DeepSpeed engine, optimizers, losses, checkpoints and signals."""
