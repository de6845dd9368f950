"""What a run will need before it runs: time, memory, processor cores, and what will be its bottleneck."""
