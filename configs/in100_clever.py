"""CLeVER on ImageNet-100: the paper's main setting."""
