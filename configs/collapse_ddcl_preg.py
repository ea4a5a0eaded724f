"""DDCL with L_PReg: as collapse_ddcl.py but for lambda.

python train.py configs/collapse_ddcl_preg.py
"""

from configs.collapse_ddcl import *

lam = 0.001
out_dir = "out/collapse_ddcl_preg"
