"""DINO on CIFAR-10, ResNet-18 with the small-image stem: the field's small benchmark.

    python train.py configs/cifar10_dino_resnet18.py --download=True

The recipe is that of lightly's CIFAR-10 benchmark: two views of 32 px without blur, SGD, batch 128,
200 epochs. It reports a kNN accuracy of 86.8 % there (84.0 % in a later version, 88.4 % with batch
512 and 800 epochs), of k = 200; ours is of k = 20. solo-learn's linear probe: 89.5 %, 1000 epochs.
Hardware: one GPU of any size. Here only six epochs of small images were run, which do not suffice:
docs/real_images.md.
"""

method = "dino"
data = "cifar10"
arch = "resnet18"  # at 32 px with the small stem: --stem=auto
recipe = "baug"  # the benchmark has no rotation; --recipe=caug is the paper's
img_size, local_crops = 32, 0
blur = solarize = False
out_dim = 2048
epochs, warmup_epochs = 200, 1
optimizer = "sgd"
batch_size, lr = 128, 0.12  # 0.06 for 128 images
weight_decay = weight_decay_end = 5e-4
teacher_momentum = 0.99
out_dir = "out/cifar10_dino_resnet18"
