"""CLeVER on CIFAR-10, ResNet-18: cifar10_dino_resnet18.py with another method.

python train.py configs/cifar10_clever_resnet18.py --download=True
"""

from configs.cifar10_dino_resnet18 import *

method = "clever"
out_dir = "out/cifar10_clever_resnet18"
