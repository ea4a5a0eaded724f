"""CLeVER with L_PReg: collapse_ddcl.py with another method and lambda.

python train.py configs/collapse_clever.py
"""

from configs.collapse_ddcl import *

method = "clever"
lambda_preg = 0.001
out_dir = "out/collapse_clever"
