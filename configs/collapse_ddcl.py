"""DDCL without L_PReg: does the ef head buy orthogonality by shrinking? The demo's shapes and network, two views, six minutes on a core.

    for c in ddcl ddcl_preg clever_lam0 clever; do python train.py configs/collapse_$c.py; done

The README has the table of the four, what was tried besides, and the lines that print it from the logs.
"""

from configs.demo import *

method = "ddcl"
orth = "dot"  # the paper's formula: with 'cosine' lengths do not count
lam = 0.0
local_crops = 0  # DDCL knows two views
optimizer, lr = "sgd", 0.1  # SimSiam's and DDCL's optimiser; under AdamW nothing shrank
weight_decay = weight_decay_end = 5e-4
epochs, eval_every, probe_at_end = 6, 2, False  # what happens, happens in the first two
out_dir = "out/collapse_ddcl"
