"""The fast scans against the loop, SS2D against itself written out, the backbone against VMamba's published figures."""

import math
import os
import subprocess
import sys
import types

import pytest
import torch
import torch.nn.functional as F

import vmamba
from configurator import UsageError
from conftest import ROOT
from model import build_backbone, load_backbone, save_atomically

NAMES = ("u", "delta", "A", "B", "C", "D", "delta_bias")


def arguments(images, K, C, N, L, dtype=torch.float64, seed=0):
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
    given = arguments(2, 4, 3, N, L)
    for name, loop, fast in zip(
        ("y", *NAMES), value_and_gradients(given, "loop"), value_and_gradients(given, "torch")
    ):
        torch.testing.assert_close(fast, loop, msg=lambda m: f"{name}: {m}")


@pytest.mark.parametrize("backend", ["loop", "torch"])
@pytest.mark.parametrize("N, L", [(1, 1), (1, 7), (2, 5), (4, 3)])
def test_gradients_are_the_finite_differences(backend, N, L):
    assert torch.autograd.gradcheck(
        lambda *given: vmamba.selective_scan(*given, backend=backend), arguments(1, 2, 2, N, L)
    )


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
def test_single_and_half_precision_inputs(dtype, tolerance):
    """bf16 inputs are rounded, the scan is not: the oracle gets the same rounded inputs in fp64."""
    given = arguments(2, 4, 8, 1, 121, dtype)
    exact = value_and_gradients([x.double() for x in given], "loop")
    for name, got, expected in zip(("y", *NAMES), value_and_gradients(given, "torch"), exact):
        assert got.dtype == dtype
        error = (got.double() - expected).abs().max() / expected.abs().max()
        assert error < tolerance, (name, error)


def test_extreme_steps_neither_overflow_nor_underflow_to_nan():
    u, delta, A, B, C, D, bias = arguments(1, 4, 2, 1, 90, torch.float32)
    for d, a in ((50.0, -16.0), (-50.0, -16.0), (50.0, -1e-6), (0.0, -1e4)):
        given = [u, torch.full_like(delta, d), torch.full_like(A, a), B, C, D, bias]
        exact = value_and_gradients([x.double() for x in given], "loop")
        for name, got, expected in zip(("y", *NAMES), value_and_gradients(given, "torch"), exact):
            assert got.isfinite().all() and (
                got - expected
            ).abs().max() <= 1e-4 * expected.abs().max().clamp(min=1e-3), (d, a, name)


def test_memory_layout_changes_nothing():
    given = arguments(2, 4, 3, 1, 36)
    last = [x.detach().mT.contiguous().mT.requires_grad_() if x.ndim == 3 else x for x in given]
    for a, b in zip(value_and_gradients(given, "torch"), value_and_gradients(last, "torch")):
        torch.testing.assert_close(a, b)


def test_saved_tensors_are_at_most_twice_the_input():
    given, saved = arguments(2, 4, 96, 1, 784, torch.float32), {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.setdefault(t.untyped_storage().data_ptr(), t), lambda t: t
    ):
        vmamba.selective_scan(*given, backend="torch")
    size = sum(t.untyped_storage().nbytes() for t in saved.values())
    assert 0 < size <= 2 * sum(x.untyped_storage().nbytes() for x in given)


def test_the_backend_is_chosen_once_and_refused_where_it_cannot_run(monkeypatch):
    cpu = torch.device("cpu")
    assert vmamba.choose_backend(cpu) == "torch" and vmamba.choose_backend(cpu, "loop") == "loop"
    monkeypatch.setattr(vmamba, "default_backend", "loop")
    assert vmamba.choose_backend(cpu) == "loop"
    monkeypatch.setattr(vmamba, "triton", None)
    with pytest.raises(UsageError, match="take --scan=torch"):
        vmamba.choose_backend(cpu, "triton")
    with pytest.raises(UsageError, match="choose from"):
        vmamba.choose_backend(cpu, "cuda")


def compare_triton(device, dtype, tolerance, sizes):
    """Both forms of the Triton scan against the loop; run by the two tests below."""
    for images, C, N, H, W in sizes:
        given = [
            x.detach().to(device).requires_grad_() for x in arguments(images, 4, C, N, H * W, dtype)
        ]
        exact = value_and_gradients([x.double() for x in given], "loop")
        first, again = (value_and_gradients(given, "triton") for _ in range(2))
        for name, got, same, expected in zip(("y", *NAMES), first, again, exact):
            assert torch.equal(got, same), f"{name} differs from run to run"
            error = (got.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-3)
            assert error < tolerance, (C, N, H, W, name, error)
        torch.manual_seed(0)
        module = vmamba.SS2D(C, 1.0, N).to(device)
        x = torch.randn(images, H, W, C, device=device)
        results = []
        for backend, autocast in (("triton", False), ("torch", False), ("triton", True)):
            vmamba.default_backend, x_ = backend, x.clone().requires_grad_()
            with torch.autocast(device, torch.bfloat16, enabled=autocast):
                y = module(x_)
            module.zero_grad()
            y.float().square().sum().backward()
            results.append(
                [y.detach().float(), x_.grad, *(p.grad.clone() for p in module.parameters())]
            )
        vmamba.default_backend = None
        for tolerated, got in ((10 * tolerance, results[0]), (0.1, results[2])):
            for a, expected in zip(got, results[1]):
                error = (a - expected).norm() / expected.norm().clamp(min=1e-3)
                assert error < tolerated, (C, N, H, W, error)


def test_triton_kernels_in_the_interpreter():
    """In a process of its own, for Triton decides at import whether it interprets. Small tiles, so that chunks and blocks of channels meet."""
    pytest.importorskip("triton", reason="Triton is not installed here")
    code = (
        "import torch, vmamba, test_vmamba; vmamba.CHUNK, vmamba.BLOCK_C = 8, 4; "
        "test_vmamba.compare_triton('cpu', torch.float32, 1e-4, [(1, 3, 2, 5, 3), (1, 5, 1, 3, 7), (1, 2, 1, 1, 1)]); "
        "vmamba.CHUNK, vmamba.BLOCK_C = 64, 32; test_vmamba.compare_triton('cpu', torch.float32, 1e-4, [(1, 33, 1, 11, 6)])"
    )  # the tile that is shipped
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "TRITON_INTERPRET": "1",
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        },
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
def test_triton_kernels_on_the_gpu(dtype, tolerance):
    compare_triton(
        "cuda",
        dtype,
        tolerance,
        [
            (2, 96, 1, 56, 56),
            (2, 100, 1, 13, 7),
            (1, 33, 4, 5, 5),
            (3, 64, 1, 1, 1),
            (1, 768, 1, 7, 7),
        ],
    )


# ------------------------------------------------------------------------------------------------ SS2D and the backbone


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
    """Oracle: channels first, four copies of the map, the projections after them, as VMamba writes it; the scan by the loop."""
    torch.manual_seed(0)
    module, H, W = vmamba.SS2D(16, 2.0, N).double(), 4, 6
    x = torch.randn(2, H, W, 16, dtype=torch.float64)
    u = F.silu(module.conv2d(module.in_proj(x).permute(0, 3, 1, 2)))  # (B, C, H, W)
    two = torch.stack([u.flatten(2), u.mT.flatten(2)], 1)
    xs = torch.cat([two, two.flip(-1)], 1)  # (B, 4, C, L)
    numbers = torch.einsum("bkcl,kdc->bkdl", xs, module.x_proj_weight)
    low, B, C = numbers.split([module.R, N, N], 2)
    delta = torch.einsum("bkrl,kcr->bkcl", low, module.dt_projs_weight)
    ys = vmamba.scan_loop(
        xs.flatten(1, 2),
        delta.flatten(1, 2),
        -module.A_logs.exp(),
        B,
        C,
        module.Ds,
        module.dt_projs_bias.flatten(),
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
    assert (
        sum(p.numel() for p in backbone.parameters()) == pytest.approx(29.48e6, rel=1e-3)
        and backbone.dim == 768
    )
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
    assert counted.get_total_flops() / 2e9 == pytest.approx(
        4.84, rel=0.01
    )  # the published figure counts the scans too


def test_any_size_its_patch_divides_and_no_other():
    torch.manual_seed(0)
    backbone = build_backbone("vmamba_micro").eval()
    with torch.no_grad():
        for H, W in ((32, 32), (96, 96), (64, 160), (48, 56), (20, 4)):
            x = torch.randn(2, 3, H, W)
            z = backbone(x)
            assert z.shape == (2, 256)
            torch.testing.assert_close(backbone(x.contiguous(memory_format=torch.channels_last)), z)
            assert backbone.feature_map(x).shape == (2, math.ceil(H / 32), math.ceil(W / 32), 256)
    with pytest.raises(UsageError, match="patch of 4"):
        backbone(torch.randn(1, 3, 50, 64))


def test_paths_drop_in_the_student_only():
    torch.manual_seed(0)
    backbone, x = build_backbone("vmamba_micro", drop_path=0.5), torch.randn(2, 3, 32, 32)
    kept, dropped = torch.ones(2, 5, 2), torch.zeros(2, 5, 2)
    assert (
        not torch.allclose(backbone(x, dropped), backbone(x))
        and torch.equal(backbone(x), backbone(x))
        and len(backbone.blocks) == 5
    )
    scaled = build_backbone("vmamba_micro", drop_path=0.0)
    scaled.load_state_dict(backbone.state_dict())
    torch.testing.assert_close(
        scaled(x, kept), backbone(x)
    )  # a rate of 0 drops nothing and scales nothing
    half = torch.stack([kept[0], dropped[0]])
    torch.testing.assert_close(
        backbone(x, half)[0], backbone(x, kept)[0]
    )  # a sample's draws are its own


def test_published_files_load_strictly(tmp_path, monkeypatch):
    torch.manual_seed(0)
    state = build_backbone("vmamba_micro").state_dict()
    file = {
        "model": {
            **state,
            "classifier.head.weight": torch.zeros(1000, 256),
            "classifier.head.bias": torch.zeros(1000),
        }
    }
    yacs = types.ModuleType(
        "yacs.config"
    )  # VMamba's trainer saves its config, a dict of this package's kind, along
    yacs.CfgNode = type("CfgNode", (dict,), dict(__module__="yacs.config"))
    monkeypatch.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
    monkeypatch.setitem(sys.modules, "yacs.config", yacs)
    file["config"] = yacs.CfgNode(MODEL=yacs.CfgNode(TYPE="vssm"))
    file["config"].__dict__["__immutable__"] = True
    save_atomically(file, str(tmp_path / "vmamba.pth"))
    (
        monkeypatch.delitem(sys.modules, "yacs.config"),
        monkeypatch.delitem(sys.modules, "yacs"),
    )  # nobody who loads it need have that
    backbone, facts = load_backbone(str(tmp_path / "vmamba.pth"))
    assert facts["arch"] == "vmamba_micro" and all(
        torch.equal(state[key], value) for key, value in backbone.state_dict().items()
    )
    as_convolutions = {
        key: value[:, :, None, None]
        if key.endswith(("in_proj.weight", "out_proj.weight", "fc1.weight", "fc2.weight"))
        else value
        for key, value in state.items()
    }
    save_atomically(
        {"model": as_convolutions, "config": {"MODEL": "foreign"}}, str(tmp_path / "old.pth")
    )
    backbone, _ = load_backbone(str(tmp_path / "old.pth"))
    assert all(torch.equal(state[key], value) for key, value in backbone.state_dict().items())
    file["model"].pop("layers.0.blocks.0.op.Ds"), file.pop("config")
    save_atomically(file, str(tmp_path / "vmamba.pth"))
    with pytest.raises(UsageError, match="vmamba_micro, where 1 entries differ"):
        load_backbone(str(tmp_path / "vmamba.pth"))


def test_a_compiled_block_is_the_eager_one(scans_put_back):
    """The scan itself is left out of the graph; what is around it compiles (here without a code generator: that needs a C++ compiler)."""
    vmamba.keep_out_of_graphs()
    torch.manual_seed(0)
    block, x = vmamba.VSSBlock(32, 1.0), torch.randn(2, 4, 4, 32)
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
    import train
    from conftest import tiny_config

    run = train.make_run(
        tiny_config(arch="vmamba_micro", img_size=32, local_size=32), 10, torch.device("cpu")
    )
    names = {id(p): name for name, p in run.network.named_parameters()}
    [matrices, others] = [
        [names[id(p)] for p in group["params"]] for group in run.optimizer.param_groups
    ]
    assert any(name.endswith("A_logs") for name in others) and any(
        name.endswith("dt_projs_bias") for name in others
    )
    assert any(name.endswith("x_proj_weight") for name in matrices) and not any(
        name.endswith(vmamba.NO_DECAY) for name in matrices
    )


def test_it_trains_through_train_py_and_is_judged_like_the_others(folder, tmp_path):
    import eval_linear
    from conftest import arguments as knobs, run_script

    done = run_script(
        "train.py",
        *knobs(
            arch="vmamba_micro",
            img_size=32,
            local_size=32,
            drop_path=0.2,
            data=folder,
            out_dir=tmp_path,
        ),
    )
    assert "selective scan: torch" in done.stdout
    eval_linear.main(
        [
            f"--ckpt={tmp_path / 'ckpt.pt'}",
            "--tests=orig",
            "--epochs=1",
            "--batch_size=32",
            "--workers=0",
            "--precision=fp32",
            "--device=cpu",
        ]
    )
    wrong = run_script(
        "train.py",
        *knobs(
            arch="vmamba_micro", img_size=32, local_size=18, data=folder, out_dir=tmp_path / "other"
        ),
        check=False,
    )
    assert (
        wrong.returncode == 2
        and "local_size=18 is not a multiple of vmamba_micro's 4: take 16" in wrong.stderr
    )
    wrong = run_script(
        "train.py",
        *knobs(
            arch="vmamba_micro",
            img_size=32,
            local_size=32,
            data=folder,
            scan="triton",
            out_dir=tmp_path / "other",
        ),
        check=False,
    )
    assert (
        wrong.returncode == 2
        and "take --scan=torch" in wrong.stderr
        and not (tmp_path / "other").exists()
    )
