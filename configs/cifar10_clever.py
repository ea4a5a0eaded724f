"""CLeVER on CIFAR-10, ViT-Tiny/4: small images, one GPU.

    python train.py configs/cifar10_clever.py --download=True

Hardware: one GPU of any size. It takes hours; not yet measured.
No published number: the paper does not use CIFAR.
"""

data = "cifar10"
arch, patch_size = "vit_tiny", 4  # 8 x 8 patches of the global crop
img_size, local_size = 32, 16
local_crops = 6
blur = solarize = False  # at 32 px they destroy what little detail there is
out_dim = 4096  # 50,000 images do not fill 65536 prototypes
head_hidden = 1024
epochs, warmup_epochs = 200, 10
batch_size = 256
max_batch_per_gpu = 256
teacher_momentum = 0.996
workers = 4
out_dir = "out/cifar10_clever"
