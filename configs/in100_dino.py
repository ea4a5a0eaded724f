"""DINO on ImageNet-100, ViT-S/16: the baseline of in100_clever.py, all else equal.

    torchrun --nproc_per_node=4 train.py configs/in100_dino.py --data=/path/to/imagenet

Target (authors' README, 200 epochs, linear top-1, Orig / CJ+Ro): 73.2 / 71.0.
Other backbones and recipes:
    --arch=vit_tiny 66.2 / 62.6    --arch=resnet18 71.5 / 68.7    --arch=resnet50 78.4 / 76.4
    --recipe=baug (vit_small) 75.9 / 50.7
"""

from configs.in100_clever import *

method = "dino"
out_dir = "out/in100_dino"
