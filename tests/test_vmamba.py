"""The fast scans against the loop, SS2D against VMamba's formula, the backbone's facts."""

import math
import os
import subprocess
import sys
import types

import lib.scan_triton
from lib.checkpoint import save_atomically
from lib.config import UsageError
from lib.weights import load_backbone

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import HERE, ROOT, arguments, run_script, tiny_config

import eval_linear
import train
import vmamba
from model import build_backbone

NAMES = ("u", "delta", "A", "B", "C", "D", "delta_bias")


def scan_inputs(images, K, C, N, L, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    given = (
        normal(images, K * C, L),
        normal(images, K * C, L),
        -normal(K * C, N).exp(),
        normal(images, K, N, L),
        normal(images, K, N, L),
        normal(K * C),
        normal(K * C),
    )
    return [x.to(dtype).requires_grad_() for x in given]


def value_and_gradients(given, backend):
    given = [x.detach().clone().requires_grad_() for x in given]
    y = vmamba.selective_scan(*given, backend=backend)
    weight = torch.randn(
        y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    ).to(y)
    (y * weight).sum().backward()
    return [y.detach(), *(x.grad for x in given)]


@pytest.mark.parametrize("N", [1, 4])
@pytest.mark.parametrize("L", [1, 2, 3, 7, 13, 49, 57, 64, 101])
def test_torch_scan_is_the_loop(L, N):
    given = scan_inputs(2, 4, 3, N, L)
    for name, loop, fast in zip(
        ("y", *NAMES), value_and_gradients(given, "loop"), value_and_gradients(given, "torch")
    ):
        torch.testing.assert_close(fast, loop, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("backend", ["loop", "torch"])
@pytest.mark.parametrize("N, L", [(1, 1), (1, 7), (2, 5), (4, 3)])
def test_gradients_are_the_finite_differences(backend, N, L):
    assert torch.autograd.gradcheck(
        lambda *given: vmamba.selective_scan(*given, backend=backend), scan_inputs(1, 2, 2, N, L)
    )


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
def test_single_and_half_precision_inputs(dtype, tolerance):
    """bf16 inputs are rounded, the scan is not: the oracle gets the same rounded inputs in fp64."""
    given = scan_inputs(2, 4, 8, 1, 121, dtype)
    exact = value_and_gradients([x.double() for x in given], "loop")
    for name, got, expected in zip(("y", *NAMES), value_and_gradients(given, "torch"), exact):
        assert got.dtype == dtype
        error = (got.double() - expected).abs().max() / expected.abs().max()
        assert error < tolerance, (name, error)


def test_extreme_steps_neither_overflow_nor_underflow_to_nan():
    u, delta, A, B, C, D, bias = scan_inputs(1, 4, 2, 1, 90, torch.float32)
    for d, a in ((50.0, -16.0), (-50.0, -16.0), (50.0, -1e-6), (0.0, -1e4)):
        given = [u, torch.full_like(delta, d), torch.full_like(A, a), B, C, D, bias]
        exact = value_and_gradients([x.double() for x in given], "loop")
        for name, got, expected in zip(("y", *NAMES), value_and_gradients(given, "torch"), exact):
            assert got.isfinite().all() and (
                got - expected
            ).abs().max() <= 1e-4 * expected.abs().max().clamp(min=1e-3), (d, a, name)


def test_memory_layout_changes_nothing():
    given = scan_inputs(2, 4, 3, 1, 36)
    last = [x.detach().mT.contiguous().mT.requires_grad_() if x.ndim == 3 else x for x in given]
    for a, b in zip(value_and_gradients(given, "torch"), value_and_gradients(last, "torch")):
        torch.testing.assert_close(a, b)


def test_saved_tensors_are_at_most_twice_the_input():
    given, saved = scan_inputs(2, 4, 96, 1, 784, torch.float32), {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.setdefault(t.untyped_storage().data_ptr(), t), lambda t: t
    ):
        vmamba.selective_scan(*given, backend="torch")
    size = sum(t.untyped_storage().nbytes() for t in saved.values())
    assert 0 < size <= 2 * sum(x.untyped_storage().nbytes() for x in given)


def test_the_backend_is_chosen_once_and_refused_where_it_cannot_run(monkeypatch):
    cpu = torch.device("cpu")
    assert vmamba.choose_backend(cpu) == "torch" and vmamba.choose_backend(cpu, "loop") == "loop"
    monkeypatch.setattr(vmamba, "default_backend", None)
    vmamba.set_backend("loop")
    assert vmamba.choose_backend(cpu) == "loop"
    vmamba.set_backend("auto")
    assert vmamba.choose_backend(cpu) == "torch"
    # a network is checked on the CPU before it moves to the GPU where triton runs
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(vmamba, "available", lambda device: device.type == "cuda")
    vmamba.set_backend("triton", gpu)
    assert vmamba.choose_backend(gpu) == "triton" and vmamba.choose_backend(cpu) == "torch"
    build_backbone("vmamba_micro", 32)
    with pytest.raises(UsageError, match="scan=triton"):
        vmamba.set_backend("triton", cpu)
    vmamba.set_backend("auto")
    monkeypatch.setattr(lib.scan_triton, "triton", None)
    assert not lib.scan_triton.available(cpu)
    with pytest.raises(UsageError, match="use --scan=torch"):
        vmamba.choose_backend(cpu, "triton")
    with pytest.raises(UsageError, match="choose from"):
        vmamba.choose_backend(cpu, "cuda")


def compare_triton(device, dtype, tolerance, sizes):
    """Compare both forms of the Triton scan with the loop; run by the two tests below."""
    for images, C, N, H, W in sizes:
        given = scan_inputs(images, 4, C, N, H * W, dtype)
        given = [x.detach().to(device).requires_grad_() for x in given]
        exact = value_and_gradients([x.double() for x in given], "loop")
        first = value_and_gradients(given, "triton")
        again = value_and_gradients(given, "triton")
        for name, got, same, expected in zip(("y", *NAMES), first, again, exact):
            assert torch.equal(got, same), f"{name} differs from run to run"
            error = (got.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-3)
            assert error < tolerance, (C, N, H, W, name, error)
        torch.manual_seed(0)
        module = vmamba.SS2D(C, 1.0, N).to(device)
        x = torch.randn(images, H, W, C, device=device)
        results = []
        for backend, autocast in (("triton", False), ("torch", False), ("triton", True)):
            vmamba.set_backend(backend)
            x_ = x.clone().requires_grad_()
            with torch.autocast(device, torch.bfloat16, enabled=autocast):
                y = module(x_)
            module.zero_grad()
            y.float().square().sum().backward()
            grads = [p.grad.clone() for p in module.parameters()]
            results.append([y.detach().float(), x_.grad, *grads])
        vmamba.set_backend("auto")
        for tolerated, got in ((10 * tolerance, results[0]), (0.1, results[2])):
            for a, expected in zip(got, results[1]):
                error = (a - expected).norm() / expected.norm().clamp(min=1e-3)
                assert error < tolerated, (C, N, H, W, error)


def run_python(code, **environment):
    """Run code that may import the project and its tests, in a process of its own."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {**os.environ, "PYTHONPATH": path, **environment}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr


def scan_by_doubling(self, given):
    """Scan as a GPU does, in log2(steps) rounds; Triton's interpreter goes element by element.

    given: tensors of (steps, channels). In each round the kernel's own function combines each step
    with the one that lies `reach` before it.
    """
    assert self.axis == 0
    dtypes = [x.dtype for x in given]
    arrays = [x.handle.data for x in given]
    reach = 1
    while reach < len(arrays[0]):
        before = [self.to_tensor(np.roll(x, reach, 0), dtype) for x, dtype in zip(arrays, dtypes)]
        after = [self.to_tensor(x, dtype) for x, dtype in zip(arrays, dtypes)]
        both = self.combine_fn.fn(*before, *after)
        arrays = [np.concatenate([x[:reach], y.handle.data[reach:]]) for x, y in zip(arrays, both)]
        reach *= 2
    return [self.to_tensor(x, dtype) for x, dtype in zip(arrays, dtypes)]


def interpret_triton():
    """Run the kernels in the interpreter: small tiles, then the tile that is shipped."""
    from triton.runtime import interpreter

    interpreter.ScanOps.generic_scan = scan_by_doubling
    kernels = lib.scan_triton
    shipped = kernels.CHUNK, kernels.BLOCK_C
    assert shipped == (64, 32)
    kernels.CHUNK, kernels.BLOCK_C = 8, 4
    compare_triton("cpu", torch.float32, 1e-4, [(1, 3, 2, 5, 3), (1, 5, 1, 3, 7), (1, 2, 1, 1, 1)])
    kernels.CHUNK, kernels.BLOCK_C = shipped
    compare_triton("cpu", torch.float32, 1e-4, [(1, 33, 1, 11, 6)])


@pytest.mark.slow
def test_triton_kernels_in_the_interpreter():
    """Small tiles, so that chunks and blocks of channels meet; then the tile that is shipped.

    In a process of its own, for Triton decides at import whether it interprets.
    """
    pytest.importorskip("triton", reason="Triton is not installed here")
    run_python("import test_vmamba; test_vmamba.interpret_triton()", TRITON_INTERPRET="1")


class Compiler:
    """Stand in for a Triton kernel: compile it for the arguments of a launch, do not run it."""

    compiled = 0

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        def launch(*given, **constants):
            binary = self.kernel.warmup(*given, grid=grid, **constants).asm["cubin"]
            Compiler.compiled += len(binary) > 0

        return launch


def compile_triton(capability):
    """Compile the kernels for a GPU that is not there: a small tile with N = 2, the shipped one."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    no_gpu = types.SimpleNamespace(
        get_current_device=lambda: 0,
        get_current_target=lambda: GPUTarget("cuda", capability, 32),
        get_current_stream=lambda device: 0,
    )
    driver.set_active(no_gpu)
    vmamba.available = lambda device: True
    for name in ("_scan_forward", "_scan_adjoint", "_scan_backward"):
        setattr(lib.scan_triton, name, Compiler(getattr(lib.scan_triton, name)))
    tile = lib.scan_triton.CHUNK, lib.scan_triton.BLOCK_C
    lib.scan_triton.CHUNK, lib.scan_triton.BLOCK_C = 8, 8
    given = scan_inputs(2, 4, 24, 2, 15, torch.bfloat16)
    vmamba.selective_scan(*given, backend="triton").sum().backward()
    assert Compiler.compiled == 3 * 2
    lib.scan_triton.CHUNK, lib.scan_triton.BLOCK_C = tile
    vmamba.set_backend("triton")
    vmamba.SS2D(24, 1.0)(torch.randn(2, 3, 5, 24)).sum().backward()
    assert Compiler.compiled == 3 * 2 + 3


@pytest.mark.slow
def test_triton_kernels_compile_for_a_gpu(tmp_path):
    """The interpreter accepts what the compiler refuses, as a variable that changes its type."""
    pytest.importorskip("triton", reason="Triton is not installed here")
    code = "import torch; torch.cuda.is_available = lambda: True; "  # else Triton is not imported
    code += "import test_vmamba; test_vmamba.compile_triton(80)"
    run_python(code, TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
def test_triton_kernels_on_the_gpu(dtype, tolerance):
    sizes = [(2, 96, 1, 56, 56), (2, 100, 1, 13, 7), (1, 33, 4, 5, 5), (3, 64, 1, 1, 1)]
    sizes.append((1, 768, 1, 7, 7))
    compare_triton("cuda", dtype, tolerance, sizes)


# --- SS2D and the backbone ------------------------------------------------------------------------


def test_the_four_orders_are_rows_columns_and_both_backwards():
    H, W = 2, 3
    x = torch.arange(6.0).view(1, H, W, 1)
    orders = vmamba.cross_scan(x)[:, 0, :, 0].tolist()
    assert orders == [
        [0, 1, 2, 3, 4, 5],
        [0, 3, 1, 4, 2, 5],
        [5, 4, 3, 2, 1, 0],
        [5, 2, 4, 1, 3, 0],
    ]
    torch.testing.assert_close(vmamba.cross_merge(vmamba.cross_scan(x), H, W), 4 * x)


@pytest.mark.parametrize("N", [1, 2])
def test_ss2d_is_vmambas_formula_in_its_own_order_of_operations(N, monkeypatch):
    """Oracle: channels first, four copies of the map, the projections after them, the loop."""
    torch.manual_seed(0)
    module = vmamba.SS2D(16, 2.0, N).double()
    H, W = 4, 6
    x = torch.randn(2, H, W, 16, dtype=torch.float64)
    u = F.silu(module.conv2d(module.in_proj(x).permute(0, 3, 1, 2)))  # (B, C, H, W)
    two = torch.stack([u.flatten(2), u.mT.flatten(2)], 1)
    xs = torch.cat([two, two.flip(-1)], 1)  # (B, 4, C, L)
    numbers = torch.einsum("bkcl,kdc->bkdl", xs, module.x_proj_weight)
    low, B, C = numbers.split([module.R, N, N], 2)
    delta = torch.einsum("bkrl,kcr->bkcl", low, module.dt_projs_weight)
    ys = vmamba.selective_scan(
        xs.flatten(1, 2),
        delta.flatten(1, 2),
        -module.A_logs.exp(),
        B,
        C,
        module.Ds,
        module.dt_projs_bias.flatten(),
        backend="loop",
    ).view_as(xs)
    ys = ys[:, :2] + ys[:, 2:].flip(-1)
    y = ys[:, 0].view_as(u) + ys[:, 1].unflatten(-1, (W, H)).mT
    expected = module.out_proj(module.out_norm(y.permute(0, 2, 3, 1)))
    for backend in ("torch", "loop"):
        monkeypatch.setattr(vmamba, "default_backend", backend)
        torch.testing.assert_close(module(x), expected)


def test_tiny_has_the_published_size_and_cost():
    from torch.utils.flop_counter import FlopCounterMode

    backbone = build_backbone("vmamba_tiny").eval()
    assert sum(p.numel() for p in backbone.parameters()) == pytest.approx(29.48e6, rel=1e-3)
    assert backbone.dim == 768
    keys = set(backbone.state_dict())
    assert {
        "patch_embed.7.weight",
        "layers.2.blocks.7.op.x_proj_weight",
        "layers.0.downsample.3.bias",
        "classifier.norm.weight",
        "layers.3.blocks.1.mlp.fc2.bias",
        "layers.1.blocks.0.op.out_norm.weight",
        "layers.1.blocks.0.op.conv2d.weight",
    } <= keys
    assert not any("conv2d.bias" in key or "in_proj.bias" in key or "head" in key for key in keys)
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        backbone(torch.randn(1, 3, 224, 224))
    # the published figure counts the scans too
    assert counted.get_total_flops() / 2e9 == pytest.approx(4.84, rel=0.01)


def test_any_size():
    torch.manual_seed(0)
    backbone = build_backbone("vmamba_micro").eval()
    with torch.no_grad():
        for H, W in ((32, 32), (96, 96), (64, 160), (48, 56), (20, 4), (50, 64)):
            x = torch.randn(2, 3, H, W)
            z = backbone(x)
            assert z.shape == (2, 256)
            torch.testing.assert_close(backbone(x.contiguous(memory_format=torch.channels_last)), z)
            assert backbone.feature_map(x).shape == (2, math.ceil(H / 32), math.ceil(W / 32), 256)


def test_drop_path_scales_the_branches_of_each_block():
    torch.manual_seed(0)
    backbone = build_backbone("vmamba_micro", drop_path=0.5)
    x = torch.randn(2, 3, 32, 32)
    z = backbone(x)
    assert len(backbone.blocks) == 5 and backbone.drop_path == 0.5
    assert torch.equal(backbone(x), z)  # without factors nothing is dropped, nothing is scaled
    torch.testing.assert_close(backbone(x, torch.ones(2, 5, 2)), z)
    dropped = torch.zeros(2, 5, 2)
    assert not torch.allclose(backbone(x, dropped), z)
    block = backbone.blocks[-1]
    y = torch.randn(2, 4, 4, 256)
    assert torch.equal(block(y, dropped[:, 0]), y)
    first = block(y, torch.tensor([[2.0, 0.0]] * 2))
    torch.testing.assert_close(first, y + 2 * block.op(block.norm(y)))
    second = block(y, torch.tensor([[0.0, 3.0]] * 2))
    torch.testing.assert_close(second, y + 3 * block.mlp(block.norm2(y)))


def test_drop_path_factors_of_a_sample_are_its_own():
    torch.manual_seed(0)
    backbone = build_backbone("vmamba_micro")
    x = torch.randn(2, 3, 32, 32)
    scale = (1 / (1 - torch.linspace(0, 0.5, 5)))[None, :, None].expand(2, 5, 2)
    half = scale.clone()
    half[1] = 0
    torch.testing.assert_close(backbone(x, half)[0], backbone(x, scale)[0])
    assert not torch.allclose(backbone(x, half)[1], backbone(x, scale)[1])


@pytest.mark.slow
def test_published_files_load_strictly(tmp_path, monkeypatch):
    torch.manual_seed(0)
    state = build_backbone("vmamba_micro").state_dict()
    head = {"classifier.head.weight": torch.zeros(1000, 256)}
    head["classifier.head.bias"] = torch.zeros(1000)
    file = {"model": {**state, **head}}
    # VMamba's trainer saves its config, a dict of this package's kind, along.
    yacs = types.ModuleType("yacs.config")
    yacs.CfgNode = type("CfgNode", (dict,), dict(__module__="yacs.config"))
    monkeypatch.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
    monkeypatch.setitem(sys.modules, "yacs.config", yacs)
    file["config"] = yacs.CfgNode(MODEL=yacs.CfgNode(TYPE="vssm"))
    file["config"].__dict__["__immutable__"] = True
    save_atomically(file, str(tmp_path / "vmamba.pth"))
    # Nobody who loads the file needs that package.
    monkeypatch.delitem(sys.modules, "yacs.config")
    monkeypatch.delitem(sys.modules, "yacs")
    backbone, facts = load_backbone(str(tmp_path / "vmamba.pth"))
    assert facts["arch"] == "vmamba_micro"
    assert all(torch.equal(state[key], value) for key, value in backbone.state_dict().items())

    linear = ("in_proj.weight", "out_proj.weight", "fc1.weight", "fc2.weight")
    as_convolutions = {
        key: value[:, :, None, None] if key.endswith(linear) else value
        for key, value in state.items()
    }
    old = {"model": as_convolutions, "config": {"MODEL": "third-party"}}
    save_atomically(old, str(tmp_path / "old.pth"))
    backbone, _ = load_backbone(str(tmp_path / "old.pth"))
    assert all(torch.equal(state[key], value) for key, value in backbone.state_dict().items())

    file["model"].pop("layers.0.blocks.0.op.Ds")
    file.pop("config")
    save_atomically(file, str(tmp_path / "vmamba.pth"))
    with pytest.raises(UsageError, match="vmamba_micro, where 1 entries differ"):
        load_backbone(str(tmp_path / "vmamba.pth"))


@pytest.mark.slow
def test_a_compiled_block_is_the_eager_one(scans_put_back):
    """The scan stays out of the graph, what is around it compiles.

    Here without a code generator, which needs a C++ compiler.
    """
    vmamba.VMamba.keep_scans_out_of_graphs()
    torch.manual_seed(0)
    block = vmamba.VSSBlock(32, 1.0)
    x = torch.randn(2, 4, 4, 32)
    compiled = torch.compile(block, backend="aot_eager", dynamic=False)
    for model in (block, compiled):
        x_ = x.clone().requires_grad_()
        y = model(x_)
        y.square().sum().backward()
        if model is block:
            expected = y.detach(), x_.grad
    torch.testing.assert_close(y, expected[0])
    torch.testing.assert_close(x_.grad, expected[1], atol=1e-5, rtol=1e-4)


def test_decay_rates_do_not_decay():
    config = tiny_config(arch="vmamba_micro", img_size=32, local_size=32)
    run = train.make_run(config, 10, HERE)
    names = {id(p): name for name, p in run.network.named_parameters()}
    groups = run.optimizer.param_groups
    [matrices, others] = [[names[id(p)] for p in group["params"]] for group in groups]
    assert any(name.endswith("A_logs") for name in others)
    assert any(name.endswith("dt_projs_bias") for name in others)
    assert any(name.endswith("x_proj_weight") for name in matrices)
    assert not any(name.endswith(vmamba.VMamba.no_decay) for name in matrices)


@pytest.mark.slow
def test_it_trains_through_train_py_and_is_evaluated_like_the_others(folder, tmp_path):
    options = dict(arch="vmamba_micro", img_size=32, local_size=32, data=folder)
    done = run_script("train.py", *arguments(**options, drop_path=0.2, out_dir=tmp_path))
    assert "selective scan: torch" in done.stdout
    evaluation = "--tests=orig --epochs=1 --batch_size=32 --workers=0 --precision=fp32 --device=cpu"
    eval_linear.main([f"--ckpt={tmp_path / 'ckpt.pt'}", *evaluation.split()])

    other = tmp_path / "other"
    wrong = arguments(**{**options, "local_size": 18}, out_dir=other)
    wrong = run_script("train.py", *wrong, check=False)
    assert wrong.returncode == 2
    assert "local_size=18 is not a multiple of vmamba_micro's 4: take 16" in wrong.stderr
    wrong = arguments(**options, scan="triton", out_dir=other)
    wrong = run_script("train.py", *wrong, check=False)
    assert wrong.returncode == 2 and "use --scan=torch" in wrong.stderr and not other.exists()
