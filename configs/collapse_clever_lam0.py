"""CLeVER without L_PReg: collapse_ddcl.py with another method.

python train.py configs/collapse_clever_lam0.py
"""

from configs.collapse_ddcl import *

method = "clever"
out_dir = "out/collapse_clever_lam0"
