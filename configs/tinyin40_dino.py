"""DINO on 40 classes of Tiny ImageNet: the baseline of tinyin40_clever.py, all else equal.

    python train.py configs/tinyin40_dino.py --data=/path/to/tinyin40
    python eval_linear.py --protocol=ridge --ckpt=out/tinyin40_clever/ckpt.pt \\
        --compare=out/tinyin40_dino/ckpt.pt

The reasons for the options are in tinyin40_clever.py. Hardware, time and accuracy: as there.
"""

method = "dino"
data = "data/tinyin40"
arch, patch_size = "vit_micro", 8
img_size, local_size = 48, 24
local_crops = 4
out_dim, head_hidden = 1024, 512
drop_path = 0.0
blur = solarize = False
epochs, warmup_epochs = 10, 1
batch_size, lr = 64, 4e-3
teacher_momentum = 0.99
workers = 1
eval_every = 5
out_dir = "out/tinyin40_dino"
