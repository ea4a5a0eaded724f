"""The rooms behind the scripts: what one trusts. What one reads lies beside this folder.

Import one before torch (pyproject.toml sorts them so): how OpenMP's threads wait is read when torch
is loaded. By default they spin for a while at the end of each operation, and where another process
wants the core, one spinning thread keeps all others from working: a step then takes ten times as
long. PASSIVE: they sleep. Ranks and loading workers inherit it.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
