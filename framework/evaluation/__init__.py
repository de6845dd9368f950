"""Evaluation: metrics over views of held-out samples, and the command that runs it on a run folder."""
