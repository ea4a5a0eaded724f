"""The modules behind the scripts. The files to read first are beside this folder.

Import lib before torch (pyproject.toml sorts imports so). torch reads how OpenMP's threads wait
when it is loaded. By default they spin for a long time at the end of each operation. If another
process needs the core, one spinning thread blocks all others, and a step takes ten times as long.
PASSIVE with a spin count: they check 2,000 times (some microseconds, enough for most operations),
then they sleep. Ranks and loading workers inherit this.
"""

import os

if "OMP_WAIT_POLICY" not in os.environ:  # the user's choice stays
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
