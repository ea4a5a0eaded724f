"""What differs on a GPU: its kernels, what is compiled, batch norm over ranks, work of the host.

Most of it is held on a CPU; what is marked gpu needs a card.
"""

import ast
import importlib.util
import shutil
import sysconfig

from lib import compiled, data, processor, rng, screen, sources
from lib.batchnorm import sync_batch_norm
from lib.config import UsageError

import pytest
import torch
import torch.distributed as dist
from conftest import CPU, HERE, ROOT, run_script, tiny_config
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import model
import train

GPU = torch.device("cuda", 0)
MATMUL = torch.backends.cuda.matmul


@pytest.fixture
def flags_put_back():
    """Put back what choose_precision sets for the whole process."""
    before = MATMUL.allow_tf32, torch.backends.cudnn.allow_tf32
    cudnn_sdp = torch.backends.cuda.cudnn_sdp_enabled()
    benchmark = torch.backends.cudnn.benchmark
    yield
    MATMUL.allow_tf32, torch.backends.cudnn.allow_tf32 = before
    torch.backends.cuda.enable_cudnn_sdp(cudnn_sdp)
    torch.backends.cudnn.benchmark = benchmark


@pytest.fixture
def one_rank(tmp_path):
    """Make a process group of this process alone: NCCL where there is a GPU."""
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group(backend, store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def run_ranks(body, ranks, folder):
    path = folder / "script.py"
    path.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{body}")
    return run_script(path, processes=ranks, timeout=120)


# --- kernels


def tf32():
    """Return what is set for products and convolutions, by torch's old names and its new ones.

    torch raises where the two kinds of names were mixed.
    """
    assert MATMUL.allow_tf32 == (torch.get_float32_matmul_precision() == "high")
    assert MATMUL.allow_tf32 == (MATMUL.fp32_precision == "tf32")
    convolutions = torch.backends.cudnn.conv.fp32_precision == "tf32"
    assert torch.backends.cudnn.allow_tf32 == convolutions
    return MATMUL.allow_tf32, convolutions


def test_precision_decides_how_a_gpu_computes(monkeypatch, flags_put_back):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    for name, products in (("bf16", True), ("fp32", False), ("auto", True)):
        torch.backends.cudnn.allow_tf32 = True  # torch's default
        torch.backends.cuda.enable_cudnn_sdp(True)
        assert processor.choose_precision(name, GPU)[0] == name.replace("auto", "bf16")
        assert tf32() == (products, False)
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    with processor.exact_fp32():
        assert tf32() == (False, False)
    with pytest.raises(UsageError), processor.exact_fp32():
        raise UsageError
    assert tf32() == (True, False)


def test_a_cpu_sets_nothing(flags_put_back):
    MATMUL.allow_tf32 = True
    processor.choose_precision("fp32", CPU)
    assert MATMUL.allow_tf32
    MATMUL.allow_tf32 = False
    processor.choose_precision("bf16", CPU)
    assert not MATMUL.allow_tf32
    with processor.exact_fp32():
        assert tf32()[0] is False
    assert tf32()[0] is False


def test_one_place_decides_how_a_gpu_computes():
    """For the scripts; tools/bench.py gives its reference side torch's own defaults."""
    names = {"set_float32_matmul_precision", "allow_tf32", "fp32_precision", "enable_cudnn_sdp"}
    used = set()
    for path in (*ROOT.glob("*.py"), *ROOT.glob("lib/*.py")):
        nodes = ast.walk(ast.parse(path.read_text()))
        if names & {node.attr for node in nodes if isinstance(node, ast.Attribute)}:
            used.add(path.name)
    assert used == {"processor.py"}


def test_views_and_crops_share_a_stream(monkeypatch):
    assert processor.view_stream(CPU) is None
    assert train.make_run(tiny_config(), 5, HERE).stream is None
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: [device])
    processor.view_stream.cache_clear()
    try:
        assert processor.view_stream(GPU) is processor.view_stream(torch.device("cuda:0"))
        assert processor.view_stream(torch.device("cuda", 1)) == [torch.device("cuda", 1)]
    finally:
        processor.view_stream.cache_clear()


@pytest.mark.gpu
def test_exact_products_are_exact(flags_put_back):
    processor.choose_precision("bf16", GPU)
    x = torch.full((256, 256), 1 + 2**-20, device=GPU)
    ones = torch.eye(256, device=GPU)
    with processor.exact_fp32():
        assert torch.equal(x @ ones, x)
    assert torch.allclose(x @ ones, x, rtol=2**-10)


# --- what is compiled


class NoCompilerError(RuntimeError):
    pass


def refuse(*_, **__):
    raise NoCompilerError("it cannot be done\nfor many reasons")


@pytest.fixture
def fresh_trial(monkeypatch):
    """Forget the trials of other tests; torch.compile compiles nothing."""
    trial = compiled.why_not
    trial.cache_clear()
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    yield
    trial.cache_clear()
    compiled.fall_back_to_eager(False)


def test_a_trial_says_why_nothing_can_be_compiled(monkeypatch, tmp_path, fresh_trial):
    def cause():
        compiled.why_not.cache_clear()
        return compiled.why_not(CPU)

    assert cause() == ""
    monkeypatch.setattr(torch, "compile", lambda function: lambda x: x)
    assert "trial kernel is wrong" in cause()
    monkeypatch.setattr(torch, "compile", refuse)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
        assert cause().startswith("NoCompilerError: it cannot be done for many reasons; ")
        patch.setattr(sysconfig, "get_path", lambda *_: str(tmp_path))
        assert "Python.h" in cause() and "python3-dev" in cause()
        (tmp_path / "Python.h").touch()
        assert "Python.h" not in cause()
        patch.setattr(shutil, "which", lambda name: None)
        assert "install gcc" in cause()
        patch.setattr(importlib.util, "find_spec", lambda name: None)
        assert "pip install triton" in cause()


def is_compiled(network):
    return [block._compiled_call_impl is not None for block in network.backbone.blocks]


def test_without_a_compiler_a_run_is_eager_and_says_so(monkeypatch, folder, fresh_trial):
    """--compile=True is then an error, in one line."""
    monkeypatch.setattr(torch, "compile", refuse)
    network = model.build_network(tiny_config())
    wanted, line = compiled.compile_blocks([network], None, GPU)
    assert not wanted and not any(is_compiled(network))
    assert line.startswith("blocks run eagerly: ") and "\n" not in line
    with pytest.raises(UsageError, match=r"^compile=True: .*, or omit --compile$"):
        compiled.compile_blocks([network], True, GPU)

    monkeypatch.setattr(compiled, "compile_blocks", lambda *_: (wanted, line))
    images, config = sources.open_images(str(folder), "train"), tiny_config()
    run = train.make_run(config, 5, HERE)
    assert run.config.compile is False
    assert f"\n{line}\n" in screen.first_screen(run, 0, images)
    batch = next(iter(data.train_loader(images, config, 0, 1, HERE)))
    assert train.train_step(run, 0, batch)["loss"].isfinite()


def test_what_is_compiled_by_default(monkeypatch, fresh_trial):
    """A ViT's blocks on a GPU, nothing on a CPU, no ResNet; with --compile=False no trial runs."""
    network = model.build_network(tiny_config())
    with monkeypatch.context() as patch:
        patch.setattr(torch, "compile", refuse)
        patch.setattr(compiled, "COMPILERS", {})
        assert compiled.compile_blocks([network], None, CPU) == (False, "")
        assert compiled.compile_blocks([network], False, GPU) == (False, "")
        resnet = model.build_network(tiny_config(arch="resnet18"))
        assert compiled.compile_blocks([resnet], None, GPU) == (False, "")
    assert not any(is_compiled(network))

    monkeypatch.setattr(compiled, "why_not", lambda device: "")
    options = torch._dynamo.config
    with options.patch(suppress_errors=False, optimize_ddp=True, recompile_limit=8):
        assert compiled.compile_blocks([network], None, GPU) == (True, "blocks compiled")
        assert options.suppress_errors and not options.optimize_ddp
    assert all(is_compiled(network))


@pytest.mark.parametrize("splits", [True, False])
def test_a_block_of_several_ranks_is_one_graph(splits, one_rank):
    """What compile_blocks sets; by default a block of vit_small is cut where 1 MB of weights is."""
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    device = GPU if torch.cuda.is_available() else CPU
    block, counter = model.Block(384, 6).to(device), CompileCounter()
    block.compile(backend=counter, dynamic=False)
    together = nn.parallel.DistributedDataParallel(nn.Sequential(block))
    with torch._dynamo.config.patch(optimize_ddp=splits):
        together(torch.randn(2, 5, 384, device=device)).sum().backward()
    assert (counter.frame_count == 1) != splits, counter.frame_count
    torch._dynamo.reset()


@pytest.mark.gpu
def test_a_compiled_step_of_vit_small_in_bf16(flags_put_back):
    """With its backward: the last block's attention has a single query, cuDNN's is off."""
    options = dict(arch="vit_small", patch_size=16, img_size=224, local_size=96, local_crops=2)
    options |= dict(batch_size=8, out_dim=4096, warmup_epochs=0, device="cuda")
    crops = [torch.randint(0, 256, (8, 2, 3, side, side), dtype=torch.uint8) for side in (224, 96)]
    batch = data.Batch(*crops, rng.sample_seeds(0, torch.arange(8)), torch.zeros(8).long(), [])
    losses = []
    for precision, wanted in (("fp32", False), ("bf16", None)):
        here = HERE._replace(device=GPU, precision=precision)
        here = here._replace(autocast=processor.choose_precision(precision, GPU)[1])
        config = tiny_config(**options, precision=precision, compile=wanted)
        run = train.make_run(config, 5, here)
        assert run.config.compile == (wanted is None), run.notes
        for step in range(2):
            loss = train.train_step(run, step, batch)["loss"]
        assert run.skipped.tolist() == [0, 0]
        losses.append(loss)
    torch.testing.assert_close(*losses, rtol=0.02, atol=1e-2)


@pytest.mark.parametrize("arch, searches", [("vit_micro", False), ("resnet18", True)])
def test_convolutions_are_searched_for_on_a_gpu_only(arch, searches, flags_put_back):
    config = tiny_config(arch=arch)
    torch.backends.cudnn.benchmark = True
    train.make_run(config, 5, HERE)
    assert torch.backends.cudnn.benchmark is False
    if torch.cuda.is_available():
        train.make_run(config, 5, HERE._replace(device=GPU))
        assert torch.backends.cudnn.benchmark is searches


# --- batch norm over ranks

RANK_PARTS = """
import torch, torch.distributed as dist
from torch import nn
from lib import machine
from lib.batchnorm import sync_batch_norm

here = machine.join("cpu", "fp32")
calls = []
for name in ("all_gather_into_tensor", "all_reduce", "all_gather", "broadcast"):
    def count(*arguments, name=name, function=getattr(dist, name), **options):
        calls.append(name)
        return function(*arguments, **options)
    setattr(dist, name, count)

CASES = [  # shape of all ranks' batch, type of x, of the parameters, affine, relative tolerance
    ((6, 5, 4, 4), torch.float64, torch.float64, True, 1e-12),
    ((6, 5), torch.float64, torch.float64, False, 1e-12),
    ((6, 5, 4, 4), torch.float32, torch.float32, True, 2e-6),
    ((6, 5), torch.float32, torch.float32, False, 2e-6),
    ((6, 5, 4, 4), torch.bfloat16, torch.float32, True, 1e-2),
    ((6, 5), torch.bfloat16, torch.float32, False, 1e-2),
]
for shape, dtype, parameters, affine, rtol in CASES:
    torch.manual_seed(0)
    kind = nn.BatchNorm2d if len(shape) == 4 else nn.BatchNorm1d
    alone = nn.Sequential(kind(shape[1], affine=affine)).to(parameters)
    if affine:
        nn.init.normal_(alone[0].weight)
        nn.init.normal_(alone[0].bias)
    # ranks' means differ by far more than the images of a rank do, and all are far from 0
    x = torch.randn(shape, dtype=torch.float64)
    x += 30 + 5 * torch.arange(3.0).repeat_interleave(2).view(-1, *[1] * (len(shape) - 1))
    x, dy = x.to(dtype), torch.randn(shape, dtype=torch.float64).to(dtype)
    if len(shape) == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    together = sync_batch_norm(nn.Sequential(kind(shape[1], affine=affine)).to(parameters))
    together.load_state_dict(alone.state_dict())
    assert list(together.state_dict()) == list(alone.state_dict())

    part = slice(2 * here.rank, 2 * here.rank + 2)
    whole, mine = x.clone().requires_grad_(), x[part].clone().requires_grad_()
    expected, y = alone(whole), together(mine)
    assert calls == ["all_gather_into_tensor"], calls
    expected.backward(dy)
    y.backward(dy[part])
    assert calls == ["all_gather_into_tensor", "all_reduce"], calls
    calls.clear()

    def same(a, b):
        assert a.dtype == b.dtype
        scale = b.detach().abs().max().item()
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol * scale)

    same(y, expected[part])
    same(mine.grad, whole.grad[part])
    for a, b in zip(together.buffers(), alone.buffers()):
        same(a, b)
    for a, b in zip(together.parameters(), alone.parameters()):
        dist.all_reduce(a.grad)
        same(a.grad, b.grad)
    calls.clear()

    # without a gradient, as a teacher; in an evaluation as every batch norm
    with torch.no_grad():
        same(together(x[part]), alone(x)[part])
    assert calls == ["all_gather_into_tensor"]
    same(together.eval()(x), alone.eval()(x))
    assert calls.pop() and not calls
machine.wait_for_ranks()
"""


@pytest.mark.slow
def test_batch_norm_over_ranks_is_that_of_the_whole_batch(tmp_path):
    """Output, gradients, running means; one collective forward, one backward."""
    run_ranks(RANK_PARTS, 3, tmp_path)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(6, 5, 4, 4), (6, 5)])
def test_batch_norm_over_ranks_on_a_gpu(shape, dtype, one_rank):
    """The same as torch's, by other kernels; and nothing waits for the device."""
    kind = nn.BatchNorm2d if len(shape) == 4 else nn.BatchNorm1d
    layouts = [torch.contiguous_format, torch.channels_last]
    for layout in layouts if len(shape) == 4 else layouts[:1]:
        alone, together = kind(5).to(GPU), sync_batch_norm(nn.Sequential(kind(5).to(GPU)))
        x = (30 + 5 * torch.randn(shape, device=GPU)).to(dtype).contiguous(memory_format=layout)
        dy = torch.randn_like(x)
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        together(x)  # NCCL sets itself up
        alone(x)
        torch.cuda.set_sync_debug_mode("error")
        y = together(a)
        y.backward(dy)
        torch.cuda.set_sync_debug_mode("default")
        expected = alone(b)
        expected.backward(dy)
        tolerance = dict(rtol=1e-2, atol=3e-2) if dtype == torch.bfloat16 else dict()
        torch.testing.assert_close(y, expected, **tolerance)
        torch.testing.assert_close(a.grad, b.grad, **tolerance)
        for p, q in zip(together.parameters(), alone.parameters()):
            torch.testing.assert_close(p.grad, q.grad, **tolerance)
        for p, q in zip(together.buffers(), alone.buffers()):
            torch.testing.assert_close(p, q, **tolerance)


# --- work of the host


class Count(TorchDispatchMode):
    """Count the operations of a block: on a GPU each is a kernel that the host starts."""

    def __init__(self):
        super().__init__()
        self.n = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.n += 1
        return function(*args, **(kwargs or {}))


def test_drop_path_is_one_copy_and_few_operations(monkeypatch):
    run = train.make_run(tiny_config(drop_path=0.3), 5, HERE)
    seeds = rng.sample_seeds(0, torch.arange(4))
    views = [torch.zeros(2, 4, 1, 1, 1), torch.zeros(3, 4, 1, 1, 1)]
    copies = []
    monkeypatch.setattr(processor, "to_device", lambda device, x: copies.append(x) or x)
    with Count() as count:
        scales = run.drop_path_scales(seeds, views)
    assert count.n < 90 and len(copies) == 1
    for i, scale in enumerate(torch.cat(scales)):  # of a view: by its number and its samples' seeds
        u = rng.uniforms(rng.fork(seeds, "drop_path", index=i), 12).unflatten(-1, (6, 2))
        rates = torch.linspace(0, 0.3, 6)[:, None]
        assert torch.equal(scale, (u >= rates) / (1 - rates))
    assert [x.shape for x in scales] == [(2, 4, 6, 2), (3, 4, 6, 2)]


def test_a_step_does_not_walk_through_the_modules_again(folder, monkeypatch):
    images, config = sources.open_images(str(folder), "train"), tiny_config()
    run = train.make_run(config, 5, HERE)
    walks, named_parameters = [], run.network.named_parameters
    monkeypatch.setattr(
        run.network, "named_parameters", lambda: walks.append(1) or named_parameters()
    )
    batch = next(iter(data.train_loader(images, config, 0, 1, HERE)))
    for _ in range(2):
        train.backward(run, batch)
        with Count() as clipping:
            is_finite = run.clip_gradients()
        with Count() as update:
            run.step_optimizer(is_finite)
    assert not walks
    assert clipping.n < 15 and update.n < 20


def test_skipped_steps_are_counted_in_all_and_in_a_row(folder):
    run = train.make_run(tiny_config(), 5, HERE)
    seen = []
    for is_finite in (True, False, False, True, False):
        for p in run.trained.values():
            p.grad = torch.zeros_like(p)
        run.step_optimizer(torch.tensor(is_finite))
        seen.append(run.skipped.tolist())
    assert seen == [[0, 0], [1, 1], [2, 2], [2, 0], [3, 1]]
