"""DINO on 40 classes of Tiny ImageNet: the baseline of tinyin40_clever.py, all else equal (the reasons for the knobs stand there).

    python train.py configs/tinyin40_dino.py --data=/path/to/tinyin40
    python probe.py --ckpt=out/tinyin40_clever/ckpt.pt --compare=out/tinyin40_dino/ckpt.pt --data=/path/to/tinyin40

Hardware, time and accuracy: as tinyin40_clever.py.
"""

method = "dino"
data = "data/tinyin40"
arch, patch_size = "vit_micro", 8
img_size, local_size, local_crops = 48, 24, 4
out_dim, head_hidden = 1024, 512
drop_path = 0.0
blur = solarize = False
epochs, warmup_epochs = 10, 1
batch_size, lr = 64, 4e-3
ema = 0.99
workers = 1
eval_every = 5
out_dir = "out/tinyin40_dino"
