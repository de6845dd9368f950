"""Watching a training from beside it: heartbeats, hangs, and what is written down after a crash."""
