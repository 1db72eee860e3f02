"""Sweeps: many networks trained by one program, over seeds and hyperparameters."""

from fnn.sweeps.halving import Halving
from fnn.sweeps.loop import sweep
from fnn.sweeps.result import Member, SweepResult
from fnn.sweeps.table import Table

__all__ = ["Halving", "Member", "SweepResult", "Table", "sweep"]
