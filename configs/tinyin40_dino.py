"""DINO on 40 classes of Tiny ImageNet: the baseline of tinyin40_clever.py, all else equal.

python train.py configs/tinyin40_dino.py --data=/path/to/tinyin40
"""

from configs.tinyin40_clever import *

method = "dino"
orth = "cosine"  # unused by DINO; as in the runs of before
out_dir = "out/tinyin40_dino"
