"""Weights from and to other libraries, and predictions for single files."""
