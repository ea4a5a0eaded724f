"""CLeVER on 40 classes of Tiny ImageNet (64 px), the setting of the authors' modules in method.md section 9."""
data = "data/tinyin40"
arch, patch_size = "vit_micro", 8
img_size, local_size, local_crops = 64, 32, 4
out_dim, head_hidden = 4096, 1024
blur = solarize = False
epochs, warmup_epochs = 9, 1
batch_size, lr = 64, 4e-3
ema = 0.99
workers = 1
eval_every = 3
out_dir = "out/tinyin40_clever"
