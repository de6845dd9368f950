"""Tracking: the journal, which is the truth, and its mirror in MLflow.

Importing this imports neither MLflow nor torch.
"""

from framework.tracking.command import sync_command as sync
from framework.tracking.journal import Journal, read_journal
from framework.tracking.mirror import MlflowMirror, RunInfo, SyncReport, sync_run
from framework.tracking.registration import register_run, settle_run

__all__ = [
    "Journal",
    "MlflowMirror",
    "RunInfo",
    "SyncReport",
    "read_journal",
    "register_run",
    "settle_run",
    "sync",
    "sync_run",
]
