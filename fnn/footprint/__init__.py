"""How much memory a gradient takes, and what for.

Each module imports only from those above it:

    kept       what the backward pass keeps, by the part that made it
    compiled   the memory of a compiled program, and of a device
    measure    `memory`: both, for a function
    foresee    whether a program fits, before it runs
"""

from fnn.footprint.compiled import free_memory
from fnn.footprint.foresee import check_fits
from fnn.footprint.kept import Residuals, residuals
from fnn.footprint.measure import Memory, memory

__all__ = ["Memory", "Residuals", "check_fits", "free_memory", "memory", "residuals"]
