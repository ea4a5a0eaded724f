"""CLeVER with vmamba_micro on 40 classes of Tiny ImageNet: VMamba on a CPU, the scan in PyTorch.

    python train.py configs/tinyin40_clever_vmamba.py --data=/path/to/tinyin40
    python eval_linear.py --protocol=ridge --ckpt=out/tinyin40_clever_vmamba/ckpt.pt

Hardware, time and accuracy: docs/real_images.md.
Options without a comment here have theirs in tinyin40_clever.py.
"""

data = "data/tinyin40"
arch = "vmamba_micro"
img_size, local_size = 64, 32  # the last map, of stride 32, has 2 x 2 positions and one
local_crops = 4
out_dim, head_hidden = 1024, 512
drop_path = 0.0
epochs, warmup_epochs = 3, 1  # 60,000 images: enough to show that it learns
orth = "dot"  # of the recorded runs; cosine has become the default since
blur = solarize = False
batch_size, lr = 64, 5e-4  # with 3x this lr it learns, then collapses to rank 4
freeze_last_layer = 3  # prototypes that move make it collapse sooner
teacher_momentum = 0.99
workers = 1
eval_every = 1
out_dir = "out/tinyin40_clever_vmamba"
