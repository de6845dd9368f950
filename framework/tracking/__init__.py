"""Tracking: the journal, which is the truth, and its mirror in MLflow.

Nothing is imported here: the command line asks for single modules, and MLflow costs two seconds.
"""
