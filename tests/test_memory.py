"""What is held in memory: by VMamba for backward, by features of a million images.

Bytes are counted with fake tensors: they have a device, a type and a shape, but no memory.
"""

import contextlib
import runpy
import types

import lib.scan_triton
from lib import features, processor

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import vmamba
from model import build_backbone

# --- VMamba


@contextlib.contextmanager
def cuda_autocast():
    """Autocast as on a GPU, which torch.autocast refuses where there is none."""
    torch.autocast_increment_nesting()
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    yield
    torch.set_autocast_enabled("cuda", False)
    torch.autocast_decrement_nesting()
    torch.clear_autocast_cache()


class NoKernel:
    """Stand in for a Triton kernel: launch nothing."""

    def __getitem__(self, grid):
        return lambda *arguments, **constants: None


@pytest.fixture
def no_kernels(monkeypatch):
    """Let scan_triton allocate and save as on a GPU, but launch nothing."""
    mock = types.SimpleNamespace(cdiv=lambda a, b: -(-a // b))
    monkeypatch.setattr(lib.scan_triton, "triton", mock)
    for name in ("_scan_forward", "_scan_adjoint", "_scan_backward"):
        monkeypatch.setattr(lib.scan_triton, name, NoKernel(), raising=False)
    monkeypatch.setattr(torch.cuda, "device_of", lambda x: contextlib.nullcontext())
    monkeypatch.setattr(vmamba, "available", lambda device: True)
    monkeypatch.setattr(vmamba, "default_backend", "triton")


def saved_for_backward(arch, images):
    """Return the bytes that a student saves on a GPU for CLeVER's ten views of some images."""
    net = vmamba.VMamba(*vmamba.VMAMBAS[arch], drop_path=0.1)
    saved = {}
    with FakeTensorMode():
        weights = {}
        for name, p in net.named_parameters():
            strides = p.shape, p.stride()
            weights[name] = torch.empty_strided(*strides, device="cuda", requires_grad=True)
        own = {p.untyped_storage()._cdata for p in weights.values()}

        def pack(x):
            storage = x.untyped_storage()
            saved[storage._cdata] = storage  # held, so that no other takes its address
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), cuda_autocast():
            for n, side in ((2 * images, 224), (8 * images, 96)):
                x = torch.empty(n, 3, side, side, device="cuda")
                scale = torch.ones(n, len(net.blocks), 2, device="cuda")
                torch.func.functional_call(net, weights, (x, scale))
        return sum(storage.nbytes() for key, storage in saved.items() if key not in own)


@pytest.mark.slow
def test_a_gpu_saves_half_as_much_of_vmamba_for_backward(no_kernels, monkeypatch):
    """38.9 GB with everything saved, the step sizes delta (5.6 GB) too, which no switch saves."""
    half = saved_for_backward("vmamba_tiny", 128)
    assert 18e9 < half < 21e9
    monkeypatch.setattr(vmamba, "RECOMPUTES", set())
    assert half + 12e9 < saved_for_backward("vmamba_tiny", 128) < 34e9


def test_the_config_for_vmamba_fits_a_card_of_40_gb(no_kernels):
    config = runpy.run_path(str(ROOT / "configs/in100_clever_vmamba.py"))
    assert saved_for_backward(config["arch"], config["max_batch_per_gpu"]) < 20e9


def gradients(net, x, precision):
    net.zero_grad()
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        y = net(x, torch.tensor([1.25, 0.0]).repeat(len(x), len(net.blocks), 1))
    y.float().square().sum().backward()
    return [y.detach(), x.grad, *(p.grad.clone() for p in net.parameters())]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_gradients_are_those_of_a_net_that_saves_all(precision, monkeypatch):
    torch.manual_seed(0)
    net = build_backbone("vmamba_micro")
    x = torch.randn(2, 3, 32, 32)
    expected = gradients(net, x, precision)
    monkeypatch.setattr(vmamba, "RECOMPUTES", {"cpu"})
    for got, wanted in zip(gradients(net, x, precision), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=0)


class Operations(TorchDispatchMode):
    """Count the operations by name, and the largest tensor in fp64 that one makes."""

    def __init__(self):
        super().__init__()
        self.counts = {}
        self.largest = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        made = operation(*args, **(kwargs or {}))
        name = operation._schema.name
        self.counts[name] = self.counts.get(name, 0) + 1
        for x in tree_leaves(made):
            if isinstance(x, torch.Tensor) and x.dtype == torch.float64:
                self.largest = max(self.largest, x.numel())
        return made


def test_a_block_computes_no_product_again(monkeypatch):
    """What is computed again are norms and activations, not what they feed."""
    block = vmamba.VSSBlock(16, 1.0)
    counts = []
    for devices in (set(), {"cpu"}):
        monkeypatch.setattr(vmamba, "RECOMPUTES", devices)
        y = block(torch.randn(2, 4, 4, 16, requires_grad=True))
        with Operations() as operations:
            y.sum().backward()
        counts.append(operations.counts)
    without, again = counts
    for name in ("aten::mm", "aten::bmm", "aten::addmm", "aten::convolution"):
        assert without.get(name, 0) == again.get(name, 0)
    assert again["aten::native_layer_norm"] == 2 and again["aten::gelu"] == 1
    assert "aten::gelu" not in without


def test_a_cpu_and_a_teacher_compute_nothing_again(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError

    monkeypatch.setattr(vmamba, "checkpoint", refuse)
    net = build_backbone("vmamba_micro")
    net(torch.randn(1, 3, 32, 32)).sum().backward()
    monkeypatch.setattr(vmamba, "RECOMPUTES", {"cpu"})
    with torch.no_grad():
        net(torch.randn(1, 3, 32, 32))
    with pytest.raises(AssertionError):
        net(torch.randn(1, 3, 32, 32))


@pytest.mark.gpu
def test_a_gpu_holds_what_was_counted_and_computes_the_same_gradients(monkeypatch):
    torch.manual_seed(0)
    net = build_backbone("vmamba_tiny").cuda()
    x = torch.randn(16, 3, 224, 224, device="cuda")
    results, held = [], []
    for devices in ({"cuda"}, set(), {"cuda"}):
        monkeypatch.setattr(vmamba, "RECOMPUTES", devices)
        net.zero_grad()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        with torch.autocast("cuda", torch.bfloat16):
            y = net(x)
        held.append(torch.cuda.memory_allocated() - before)
        y.float().square().sum().backward()
        results.append([p.grad.clone() for p in net.parameters()])
    assert held[2] < 0.7 * held[1]  # the first call also keeps workspaces
    for got, expected in zip(*results[:2]):
        assert (got - expected).norm() <= 0.02 * expected.norm()


# --- features


def std_and_rank_at_once(z):
    """The specification: torch.cov and std of all features."""
    unit = F.normalize(z.double(), dim=-1)
    share = torch.linalg.eigvalsh(torch.atleast_2d(torch.cov(unit.T))).clamp(min=0)
    share = share / share.sum().clamp(min=1e-300)
    rank = torch.special.entr(share).sum().exp()
    return (unit.std(0).mean() * z.shape[1] ** 0.5).item(), rank.item()


@pytest.mark.parametrize("N, D", [(3000, 24), (50, 60), (200, 1)])
@pytest.mark.parametrize("rows", [1, 7, 64, 5000])
def test_std_and_rank_of_rows_in_chunks_are_those_of_all_at_once(N, D, rows, monkeypatch):
    monkeypatch.setattr(features, "CHUNK", rows * D)
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(N, D, generator=generator) * torch.linspace(3, 0.1, D) + 0.5
    assert features.std_and_rank(z) == pytest.approx(std_and_rank_at_once(z), rel=1e-10)


def labelled_features():
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(4000) // 7 % 10
    z = torch.randn(4000, 32, generator=generator) + 2.0 * F.one_hot(y, 32)
    return z, y


def test_ridge_of_rows_in_chunks_is_that_of_all_at_once(monkeypatch):
    z, y = labelled_features()
    tests = [(z[3000:], y[3000:]), (z[:100] * 1.1, y[:100])]
    at_once = features.ridge_correct(z[:3000], y[:3000], tests)
    monkeypatch.setattr(features, "CHUNK", 64 * 32)
    for some, right in zip(features.ridge_correct(z[:3000], y[:3000], tests), at_once):
        assert torch.equal(some, right)
    assert 0.3 < at_once[0].double().mean() < 0.9  # not all are easy


def test_features_in_fp64_exist_for_a_chunk_of_rows_only(monkeypatch):
    """The largest tensor in fp64 is a chunk or a matrix of D x D, however many images there are."""
    z, y = labelled_features()
    monkeypatch.setattr(features, "CHUNK", 100 * 32)
    with Operations() as operations:
        features.std_and_rank(z)
        features.ridge_correct(z, y, [(z, y)])
    assert 0 < operations.largest <= 100 * 33


def test_knn_never_rounds_to_tf32(monkeypatch):
    """Training lets a GPU round factors of products in fp32, an evaluation may not."""
    z, y = labelled_features()
    matmul = torch.backends.cuda.matmul
    allowed = matmul.allow_tf32
    seen = []
    topk = torch.Tensor.topk

    def spy(x, *arguments, **options):
        seen.append(matmul.allow_tf32)
        return topk(x, *arguments, **options)

    monkeypatch.setattr(torch.Tensor, "topk", spy)
    matmul.allow_tf32 = True
    try:
        features.knn_correct(z, y, z[:50], y[:50])
        assert seen == [False] and matmul.allow_tf32
    finally:
        matmul.allow_tf32 = allowed


@pytest.mark.gpu
def test_knn_on_a_gpu_is_that_of_the_cpu_though_training_uses_tf32():
    z, y = labelled_features()
    expected = features.knn_correct(z, y, z.flip(1), y)
    allowed = torch.backends.cuda.matmul.allow_tf32
    processor.choose_precision("bf16", torch.device("cuda", 0))
    try:
        got = features.knn_correct(z.cuda(), y, z.flip(1).cuda(), y)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed
    assert (got.cpu() == expected).double().mean() > 0.999
