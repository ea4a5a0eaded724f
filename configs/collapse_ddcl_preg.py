"""DDCL with L_PReg: collapse_ddcl.py with another lambda.

python train.py configs/collapse_ddcl_preg.py
"""

from configs.collapse_ddcl import *

lambda_preg = 0.001
out_dir = "out/collapse_ddcl_preg"
