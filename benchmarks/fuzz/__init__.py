"""Thousands of damaged inputs through sharding, manifest and loader: `python -m benchmarks.fuzz`."""
