"""CLeVER on ImageNet-100 as the paper's text has it: SGD and 500 epochs, where the scripts (in100_clever.py) have AdamW and 200.

    torchrun --nproc_per_node=4 train.py configs/in100_clever_sgd.py --data=/path/to/imagenet

Hardware: the paper's 4 x A100, 3.5 h per 100 epochs with the authors' code. The paper's table for it is lost in our copy: no number to aim at.
"""

data = "data/imagenet"
classes = "configs/in100_classes.txt"
arch = "vit_small"
recipe = "caug"
optimizer, lr = "sgd", 1e-3  # per 256 images, momentum 0.9
epochs = 500
batch_size = 512
out_dir = "out/in100_clever_sgd"
