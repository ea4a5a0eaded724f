"""CLeVER on the built-in shapes, no download: a table in about four minutes on two CPU cores.

python train.py configs/demo.py
"""

arch = "vit_micro"
patch_size = 8  # 4 x 4 patches of the global crop, 2 x 2 of the local one
img_size, local_size = 32, 16
local_crops = 4
out_dim, head_hidden = 1024, 512  # 10 classes need no 65536 prototypes
blur = solarize = False  # small images have no detail to lose
drop_path = 0.0  # six blocks, a short training: no block to spare
epochs, warmup_epochs = 7, 1
batch_size, lr = 128, 2e-3
teacher_momentum = 0.99  # few steps: the teacher must move
eval_every = 4
probe_at_end = True
out_dir = "out/demo"
