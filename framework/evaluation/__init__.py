"""Evaluation: metrics over views of held-out samples, and pictures of what a model has learned."""
