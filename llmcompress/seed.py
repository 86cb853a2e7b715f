"""One seed per run; every use of chance draws its own from it.

A recipe has one `seed`. If two parts shared it, they would draw the same numbers; if they drew from one global
generator, adding a draw in one would change the other. So each part derives its own, by name, and hands it to its own
generator:

    recipe seed ──sha256──┬── derive(seed, "calibration")      which documents, in which order
                          ├── derive(seed, "evaluate", suite)  bootstrap resampling
                          └── …

Nothing here reads or sets global state.
"""

from __future__ import annotations

import hashlib
import json

NUM_BITS = 32
"""Width of a derived seed: the most that every generator in use (Python, NumPy, torch) takes."""


def derive(seed: int, *names: str) -> int:
    """An integer seed in [0, 2**32) for the part of the run that `names` spells, from the run's own `seed`.

    The same arguments give the same seed on every machine and version; other names or another seed give one that is
    independent for every practical purpose. Names are kept apart: ("a", "bc") is not ("ab", "c").

    >>> derive(0, "calibration")
    2232636597
    >>> derive(0, "calibration") == derive(1, "calibration")
    False
    >>> derive(0, "a", "bc") == derive(0, "ab", "c")
    False
    """
    spelled = json.dumps([seed, *names]).encode()
    return int.from_bytes(hashlib.sha256(spelled).digest()[: NUM_BITS // 8], "little")


def shuffled(count: int, seed: int) -> list[int]:
    """The numbers below `count` in an order drawn from `seed`.

    Sorted by the raw draws of PCG64, whose stream NumPy promises to keep; what its shuffle makes of them it does not.
    """
    import numpy as np

    draws = np.random.PCG64(seed).random_raw(count)
    return [int(index) for index in np.argsort(draws, kind="stable")]
