"""CLeVER on 40 classes of Tiny ImageNet (20,000 images of 64 px): the small-data preset, for a CPU.

    python train.py configs/tinyin40_clever.py --data=/path/to/tinyin40
    python eval_linear.py --protocol=ridge --ckpt=out/tinyin40_clever/ckpt.pt

The folder has train/CLASS/* and val/CLASS/*.
Hardware: two CPU cores with bf16. Time and accuracy: docs/real_images.md.
The setting in which the authors' modules were measured (docs/real_images.md):
    --img_size=64 --local_size=32 --out_dim=4096 --head_hidden=1024 --drop_path=0.1 --epochs=9
"""

data = "data/tinyin40"
arch, patch_size = "vit_micro", 8
img_size, local_size = 48, 24  # 37 and 10 tokens: 1.7x the images per second of 64 and 32
local_crops = 4
out_dim, head_hidden = 1024, 512  # 20,000 images do not fill 65536 prototypes
drop_path = 0.0  # six blocks, a short training: no block to spare
orth = "dot"  # of the recorded runs; cosine has become the default since
blur = solarize = False  # at 64 px they destroy what little detail there is
epochs, warmup_epochs = 10, 1
batch_size, lr = 64, 4e-3  # few images, so many small steps (peak lr 1e-3)
teacher_momentum = 0.99  # the teacher moves within an epoch of 312 steps
workers = 1
eval_every = 5
out_dir = "out/tinyin40_clever"
