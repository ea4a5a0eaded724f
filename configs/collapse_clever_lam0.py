"""CLeVER without L_PReg: as collapse_ddcl.py but for the method.

python train.py configs/collapse_clever_lam0.py
"""

from configs.collapse_ddcl import *

method = "clever"
out_dir = "out/collapse_clever_lam0"
