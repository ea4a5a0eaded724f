"""The rooms behind the scripts: what one trusts. What one reads lies beside this folder.

Import one before torch (pyproject.toml sorts them so): how OpenMP's threads wait is read when torch
is loaded. By default they spin for long at the end of each operation, and where another process
wants the core, one spinning thread keeps all others from working: a step then takes ten times as
long. PASSIVE with a spin count: they look 2,000 times (some microseconds, most operations end
within it), then they sleep. Ranks and loading workers inherit it.
"""

import os

if "OMP_WAIT_POLICY" not in os.environ:  # the user's choice stays
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
