"""Where an inf or nan was born: the first on the way to a result that isn't finite.

Each module imports only from those above it:

    entries   entries that are inf or nan, and which inputs of an operation they came from
    devices   the devices of a shard_map: what is inside it, run on the numbers of all of them
    loops     a loop, run compiled, and each of its steps
    levels    a program run on numbers; what is inside its loops, branches and calls
    examples  which example an entry belongs to
    report    `Birth`: what is found, as fields and as text
    walk      from an output back to where its inf or nan was born
    find      `find_nonfinite`
"""

from fnn.birth.find import birth_of, find_nonfinite
from fnn.birth.report import Birth

__all__ = ["Birth", "birth_of", "find_nonfinite"]
