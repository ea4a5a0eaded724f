"""CLeVER on small shapes with a ViT of 0.2 M parameters: the setting of docs/results.md.

    python train.py configs/nano_shapes.py
    python train.py configs/nano_shapes.py --method=dino --out_dir=out/nano_dino

Hardware: one CPU core.
"""

data = "shapes20k"
arch, patch_size = "vit_nano", 4
img_size, local_size = 16, 8
local_crops = 4
out_dim, head_hidden, head_bottleneck = 256, 256, 64
drop_path = 0.0
blur = solarize = False
epochs, warmup_epochs = 4, 0.5
batch_size, lr = 128, 4e-3
teacher_momentum = 0.99
eval_every = 1
log_every = 50
precision = "fp32"  # the same numbers on more machines
out_dir = "out/nano_shapes"
