"""DDCL without L_PReg: does the ef head reach orthogonality by shrinking its output?

    python train.py configs/collapse_ddcl.py

The demo's images and network, two views, six minutes on one core. docs/ablations.md compares it
with L_PReg (--lambda_preg=0.001) and with CLeVER (--method=clever).
"""

from configs.demo import *

method = "ddcl"
orth = "dot"  # the paper's formula; 'cosine' ignores lengths
lambda_preg = 0.0
local_crops = 0  # DDCL has two views
optimizer, lr = "sgd", 0.1  # as SimSiam and DDCL; with AdamW nothing shrank
weight_decay = weight_decay_end = 5e-4
epochs, eval_every = 6, 2  # the shrinking happens in the first two epochs
probe_at_end = False
out_dir = "out/collapse_ddcl"
