"""CLeVER on ImageNet-100 as in the paper's text: SGD, 500 epochs.

    torchrun --nproc_per_node=4 train.py configs/in100_clever_sgd.py --data=/path/to/imagenet

The published scripts (in100_clever.py) use AdamW and 200 epochs.
Hardware: the authors' code takes 3.5 h per 100 epochs on 4 x A100.
Target: none; our copy of the paper lacks the table.
"""

data = "data/imagenet"
classes = "configs/in100_classes.txt"
arch = "vit_small"
recipe = "caug"
optimizer, lr = "sgd", 1e-3  # per 256 images, momentum 0.9
epochs = 500
batch_size = 512
out_dir = "out/in100_clever_sgd"
