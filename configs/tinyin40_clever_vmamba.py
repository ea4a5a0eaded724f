"""CLeVER with vmamba_micro on 40 classes of Tiny ImageNet: VMamba on a CPU, the scan in PyTorch.

    python train.py configs/tinyin40_clever_vmamba.py --data=/path/to/tinyin40
    python probe.py --ckpt=out/tinyin40_clever_vmamba/ckpt.pt --data=/path/to/tinyin40

Hardware, time and what it reached: the README. The reasons for the other knobs stand in tinyin40_clever.py.
"""

data = "data/tinyin40"
arch = "vmamba_micro"
img_size, local_size, local_crops = (
    64,
    32,
    4,
)  # its last map, of stride 32, keeps 2 x 2 and one position of them
out_dim, head_hidden = 1024, 512
drop_path = 0.0
blur = solarize = False
epochs, warmup_epochs = 3, 1  # 60,000 images: to show that it learns, no more
batch_size, lr = (
    64,
    5e-4,
)  # at three times this rate and more it learns, then narrows to four dimensions and forgets (README)
freeze_last_layer = 3  # and prototypes that turn narrow it sooner
ema = 0.99
workers = 1
eval_every = 1
out_dir = "out/tinyin40_clever_vmamba"
