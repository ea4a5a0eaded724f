"""CLeVER with L_PReg: as collapse_ddcl.py but for the method and lambda.

python train.py configs/collapse_clever.py
"""

from configs.collapse_ddcl import *

method = "clever"
lam = 0.001
out_dir = "out/collapse_clever"
