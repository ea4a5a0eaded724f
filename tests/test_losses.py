"""The losses against the formulas written out: a double loop over pairs, in float64."""

import copy
import math

from lib import compiled, data, fused, sources

import pytest
import torch
from conftest import HERE, tiny_config
from functorch.compile import make_boxed_func, nop
from functorch.compile import min_cut_rematerialization_partition as min_cut
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import losses
import train
from model import ProjectionHead, WeightNormLinear

V, B, K = 5, 3, 11


def reference(student, teacher, center, student_temp, teacher_temp, term):
    """Average term(q_i, p_v) over the pairs (i, v), v != i, and over images."""
    q = [torch.softmax((t - center) / teacher_temp, -1).detach() for t in teacher]
    p = [torch.softmax(s / student_temp, -1) for s in student]
    pairs = [term(q[i], p[v]).mean() for i in range(2) for v in range(len(student)) if v != i]
    return sum(pairs) / len(pairs)


def CROSS_ENTROPY(q, p):
    return -(q * p.log()).sum(-1)


def DOT(q, p):
    return (q * p).sum(-1)


def COSINE(q, p):
    return torch.cosine_similarity(q, p, dim=-1)


def squares(q, s):
    """A pair term that nobody has declared: not linear in q, its gradient known to autograd."""
    return (q * s.softmax(-1)).square().sum(-1)


TERMS = {"cross-entropy": CROSS_ENTROPY, "dot": DOT, "cosine": COSINE}
CASES = {
    "cross-entropy": (losses.dino_loss, CROSS_ENTROPY),
    "dot": (losses.orthogonality, DOT),
    "cosine": (lambda *a: losses.orthogonality(*a, kind="cosine"), COSINE),
}


@pytest.mark.parametrize("case", CASES)
def test_in_fp64_they_are_fp64_heads_and_norms_too(case):
    student, teacher = (
        torch.rand(n, 2, 5, dtype=torch.float64, requires_grad=n == 3) for n in (3, 2)
    )
    ours, term = CASES[case]
    assert torch.autograd.gradcheck(
        lambda s: ours(s, teacher, torch.zeros(5, dtype=torch.float64)), student
    )
    torch.testing.assert_close(
        ours(student, teacher, torch.zeros(5)),
        reference(student, teacher, 0, 0.1, 0.04, term),
        rtol=1e-12,
        atol=0,
    )
    heads = [ProjectionHead(8, 5, 12, 6).double() for _ in range(2)]
    assert (
        heads[0](torch.randn(3, 8, dtype=torch.float64)).dtype
        == losses.projection_regularization(*heads).dtype
        == torch.float64
    )


@pytest.mark.parametrize("views", [2, 3, V])
@pytest.mark.parametrize("case", CASES)
def test_pair_losses_and_their_gradients_are_the_double_loop_over_pairs(case, views):
    ours, term = CASES[case]
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.rand(n, B, K, generator=generator) * 2 - 1 for n in (views, 2))
    center = 0.1 * torch.randn(K, generator=generator)
    fast, slow = student.clone().requires_grad_(), student.double().requires_grad_()
    expected = reference(slow, teacher.double(), center.double(), 0.1, 0.04, term)
    got = ours(fast, teacher, center, 0.1, 0.04)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-7)
    got.backward(retain_graph=True)
    expected.backward()
    torch.testing.assert_close(fast.grad.double(), slow.grad, rtol=1e-4, atol=1e-6)
    got.backward()  # as often as one likes
    torch.testing.assert_close(fast.grad.double(), 2 * slow.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["cosine", "dot"])
@pytest.mark.parametrize("sign", [1, -1])
def test_losses_of_two_views_and_their_gradients_are_the_formulas(kind, sign):
    generator = torch.Generator().manual_seed(0)
    p, z = torch.randn(2, B, K, generator=generator), torch.randn(2, B, K, generator=generator)
    z = z + sign * p.flip(0)  # so that the mean has this sign
    fast, slow = p.clone().requires_grad_(), p.double().requires_grad_()
    given = z.clone().requires_grad_()

    def unit(x):
        return x / x.square().sum(-1, keepdim=True).sqrt()

    expected = -sum((unit(slow[i]) * unit(z.double()[1 - i])).sum(-1).mean() for i in range(2)) / 2
    vector = unit if kind == "cosine" else (lambda x: x)
    expected = (
        expected
        + 3
        * (
            sum((vector(slow[i]) * vector(z.double()[1 - i])).sum(-1).mean() for i in range(2)) / 2
        ).abs()
    )
    got = losses.simsiam_loss(fast, given) + 3 * losses.ddcl_orthogonality(fast, given, kind)
    assert losses.ddcl_orthogonality(fast, given, kind) >= 0
    got.backward()
    expected.backward()
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(fast.grad.double(), slow.grad, rtol=1e-4, atol=1e-6)
    assert given.grad is None  # the gradient stops there


def layers_and_units(views):
    """Prototypes of any length and gain, unit vectors (views, B, 4), (2, B, 4), a center."""
    generator = torch.Generator().manual_seed(0)
    layers = WeightNormLinear(4, K), WeightNormLinear(4, K)
    for layer in layers:
        layer.weight_v.data = 3 * torch.randn(K, 4, generator=generator)
        layer.weight_g.data = 1 + torch.rand(K, 1, generator=generator)
    units = [torch.randn(n, B, 4, generator=generator) for n in (views, 2)]
    units = [torch.nn.functional.normalize(x, dim=-1) for x in units]
    return *layers, *units, 0.1 * torch.randn(K, generator=generator)


@pytest.mark.parametrize("chunk", [0, 1, 2])
@pytest.mark.parametrize("views", [2, V])
@pytest.mark.parametrize("kind", ["cross-entropy", "dot", "cosine"])
@pytest.mark.parametrize("compute", [fused.prototype_loss, fused.plain_loss])
def test_a_loss_with_its_last_layers_is_the_reference(compute, kind, views, chunk):
    """Value, gradients by unit vectors and prototypes, the teacher's mean and entropy."""
    layer, teacher_layer, student, teacher, center = layers_and_units(views)
    fast = student.clone().requires_grad_()
    slow = student.double().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):  # which must not reach the logits
        got, mean, entropy = compute(
            losses.PAIR_TERMS[kind], fast, layer, teacher, teacher_layer, center, (0.1, 0.04), chunk
        )
    (3 * got).backward()

    exact = copy.deepcopy(layer).double()
    t = copy.deepcopy(teacher_layer).double()(teacher.double())
    expected = reference(exact(slow), t, center.double(), 0.1, 0.04, TERMS[kind])
    (3 * expected).backward()
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(fast.grad.double(), slow.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(
        layer.weight_v.grad.double(), exact.weight_v.grad, rtol=1e-4, atol=1e-6
    )
    torch.testing.assert_close(mean.double(), t.mean((0, 1)), rtol=1e-5, atol=1e-6)
    q = torch.softmax((t - center) / 0.04, -1)
    assert entropy.item() == pytest.approx(-(q * q.log()).sum(-1).mean().item(), rel=1e-4)
    assert teacher_layer.weight_v.grad is None
    assert not mean.requires_grad and not entropy.requires_grad


@pytest.mark.parametrize("kind", losses.PAIR_TERMS)
def test_every_pair_term_is_one_number_an_image_with_autograds_gradient(kind):
    term = losses.PAIR_TERMS[kind]
    q = torch.rand(B, K, dtype=torch.float64).softmax(-1)
    s = torch.randn(B, K, dtype=torch.float64, requires_grad=True)
    assert term(q, s).shape == (B,)
    assert torch.autograd.gradcheck(lambda s: term(q, s), s)
    both = torch.rand(2, B, K, dtype=torch.float64)
    is_linear = torch.allclose(term(both[0], s) + term(both[1], s), term(both.sum(0), s))
    assert is_linear == (term in losses.LINEAR_IN_Q)


@pytest.mark.parametrize("chunk", [0, 1])
def test_a_new_pair_term_has_its_own_gradient_through_the_fused_loss(chunk):
    """Equal to all logits at once; a copy of `dot` that is squared must not train as `dot`."""
    gradients = {}
    for name, term in (("squares", squares), ("dot", losses.dot)):
        for compute in (fused.prototype_loss, fused.plain_loss):
            layer, teacher_layer, student, teacher, center = layers_and_units(V)
            student.requires_grad_()
            loss, *_ = compute(
                term, student, layer, teacher, teacher_layer, center, (0.1, 0.04), chunk
            )
            loss.backward()
            gradients[name, compute] = loss.detach(), student.grad, layer.weight_v.grad
        torch.testing.assert_close(
            gradients[name, fused.prototype_loss], gradients[name, fused.plain_loss]
        )
    new, old = (gradients[name, fused.prototype_loss][1] for name in ("squares", "dot"))
    assert not torch.allclose(new, old, rtol=0.1)


def test_a_new_pair_term_is_an_orth_and_trains_fused_as_plain(folder, monkeypatch):
    monkeypatch.setitem(losses.PAIR_TERMS, "squares", squares)
    images = sources.open_images(str(folder), "train")
    weights = {}
    for orth, is_fused in (("squares", True), ("squares", False), ("dot", True)):
        config = tiny_config(
            orth=orth, fused=is_fused, optimizer="sgd", lr=5.0, freeze_last_layer=0, warmup_epochs=0
        )
        run = train.make_run(config, 5, HERE)
        for step, batch in enumerate(data.train_loader(images, config, 0, 2, HERE)):
            train.train_step(run, step, batch)
        weights[orth, is_fused] = run.network.head_ef.last_layer.weight_v.detach()
    torch.testing.assert_close(weights["squares", True], weights["squares", False])
    assert not torch.allclose(weights["squares", True], weights["dot", True], rtol=1e-3)


@pytest.mark.parametrize("compute", [fused.prototype_loss, fused.plain_loss])
def test_a_pair_term_that_breaks_its_contract_is_refused(compute, monkeypatch):
    """Else the fused and the plain loss would differ without a word."""

    def scalar(q, s):
        return losses.dot(q, s).mean()

    def by_class(q, s):
        return q * s.softmax(-1)

    def of_the_batch(q, s):
        return losses.dot(q, s) - losses.dot(q, s).mean()

    def not_finite(q, s):
        return (q - 1).sqrt().sum(-1)

    def not_linear(q, s):
        return losses.dot(q, s).square()

    monkeypatch.setattr(losses, "LINEAR_IN_Q", {not_linear})
    layer, teacher_layer, student, teacher, center = layers_and_units(V)
    for term, message in (
        (scalar, "must return"),
        (by_class, "must return"),
        (of_the_batch, "mixes the images"),
        (not_finite, "must be finite"),
        (not_linear, "not linear"),
    ):
        with pytest.raises(AssertionError, match=message):
            compute(term, student, layer, teacher, teacher_layer, center, (0.1, 0.04))


def test_the_fused_loss_gives_the_same_gradients_again():
    layer, teacher_layer, student, teacher, center = layers_and_units(V)
    student.requires_grad_()
    loss, *_ = fused.prototype_loss(
        losses.dot, student, layer, teacher, teacher_layer, center, (0.1, 0.04)
    )
    wanted = [student, layer.weight_v]
    first = torch.autograd.grad(loss, wanted, retain_graph=True)
    half = torch.autograd.grad(0.5 * loss, wanted)
    for gradient, of_half in zip(first, half):
        torch.testing.assert_close(gradient, 2 * of_half)


# --- the pair terms compiled, as on a GPU


@pytest.fixture
def compiled_by(monkeypatch):
    """Let fused losses be compiled on the CPU by a backend of torch.compile."""

    def choose(backend):
        torch._dynamo.reset()
        compiled._compile.cache_clear()
        monkeypatch.setattr(compiled, "COMPILERS", {"cpu": backend})
        monkeypatch.setattr(compiled, "EAGER", set())

    yield choose
    compiled._compile.cache_clear()
    torch._dynamo.reset()


def loss_and_gradients(term, chunk, teacher_temp=0.04):
    layer, teacher_layer, student, teacher, center = layers_and_units(V)
    student.requires_grad_()
    temps = 0.1, teacher_temp
    given = term, student, layer, teacher, teacher_layer, center, temps, chunk
    loss, mean, entropy = fused.prototype_loss(*given)
    (3 * loss).backward()
    return [loss.detach(), mean, entropy, student.grad, layer.weight_v.grad]


def assert_equal(results, expected):
    for got, wanted in zip(results, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("chunk", [0, 2])
@pytest.mark.parametrize("term", [*losses.PAIR_TERMS.values(), squares])
@pytest.mark.slow
def test_a_compiled_loss_is_the_eager_one(term, chunk, compiled_by, capsys):
    """The teacher's temperature is another at each step: no reason to compile anew."""
    temps = [0.04, 0.05, 0.06, 0.07]
    expected = [loss_and_gradients(term, chunk, temp) for temp in temps]
    compiled_by("aot_eager")
    for temp, wanted in zip(temps, expected):
        assert_equal(loss_and_gradients(term, chunk, temp), wanted)
    assert capsys.readouterr().out == "" and not compiled.EAGER


@pytest.mark.parametrize("term", [*losses.PAIR_TERMS.values(), squares])
def test_a_compiled_term_saves_no_large_tensor_but_its_inputs(term, compiled_by):
    """So backward reads logits and probabilities and writes a gradient: nothing lies between."""
    large = []

    def note(graph, inputs):
        large.append([tuple(x.shape) for x in inputs if x.numel() > 2 * B])
        return make_boxed_func(graph)

    tables = dict(partition_fn=min_cut, decompositions=select_decomp_table)
    compiled_by(aot_autograd(fw_compiler=note, bw_compiler=note, **tables))
    logits = torch.randn(B, 64, requires_grad=True)
    value = compiled.compiled("losses", fused._value, logits.device)
    value(term, [torch.rand(B, 64)], logits, 0.1, 8).backward()
    assert large == [[(B, 64)] * 2] * 2  # of forward and of backward: q and logits


@pytest.mark.parametrize("fails_in", ["forward", "backward"])
def test_a_loss_that_cannot_be_compiled_runs_eagerly_and_says_so_once(
    fails_in, compiled_by, capsys
):
    def refuse(graph, inputs):
        raise RuntimeError("no compiler\nand more lines")

    def backend(graph, inputs):
        if fails_in == "forward":
            return refuse(graph, inputs)
        return aot_autograd(fw_compiler=nop, bw_compiler=refuse)(graph, inputs)

    expected = loss_and_gradients(losses.dot, 2)
    compiled_by(backend)
    for _ in range(2):
        for got, wanted in zip(loss_and_gradients(losses.dot, 2), expected):
            assert torch.equal(got, wanted)
    [line] = capsys.readouterr().out.splitlines()
    assert line.startswith("losses are not compiled: ") and "no compiler" in line
    assert {"losses"} == compiled.EAGER


def test_an_error_of_the_caller_is_no_error_of_the_compiler(compiled_by):
    layer, teacher_layer, student, teacher, center = layers_and_units(V)
    compiled_by("aot_eager")
    with pytest.raises(RuntimeError):
        temps = 0.1, 0.04
        fused.prototype_loss(
            losses.dot, student, layer, teacher[..., :3], teacher_layer, center, temps
        )


class Traffic(TorchDispatchMode):
    """Count the bytes that operations read and write, but for matrix products."""

    total = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        made = operation(*args, **(kwargs or {}))
        schema = operation._schema
        space, name = schema.name.split("::")
        is_view = any(a.alias_info and not a.alias_info.is_write for a in schema.arguments)
        if space == "aten" and not is_view and name not in ("mm", "addmm_", "empty_like"):
            given = tree_leaves((args, kwargs))[1 if name == "copy_" else 0 :]
            tensors = [x for x in [*given, *tree_leaves(made)] if isinstance(x, torch.Tensor)]
            self.total += sum(x.numel() * x.element_size() for x in tensors)
        return made


@pytest.mark.parametrize("kind, eager", [("cross-entropy", 7.4), ("dot", 7.4), ("cosine", 18.0)])
def test_traffic_of_a_head_that_is_not_compiled(kind, eager, monkeypatch):
    """GB that pass through memory for 128 images, 10 views and 65536 prototypes.

    Compiled 4.3, 4.7 and 5.7, by the kernels that inductor writes for an A100.
    """
    monkeypatch.setattr(fused, "check_term", lambda term: None)  # it looks at values
    with FakeTensorMode():
        layers = [WeightNormLinear(256, 65536) for _ in range(2)]
        student, teacher = torch.empty(10, 128, 256), torch.empty(2, 128, 256)
        pair = student.requires_grad_(), layers[0], teacher, layers[1]
        with Traffic() as traffic:
            fused.prototype_loss(
                losses.PAIR_TERMS[kind], *pair, torch.empty(65536), (0.1, 0.04), 64
            )
    assert traffic.total / 1e9 == pytest.approx(eager, rel=0.02)


@pytest.mark.gpu
@pytest.mark.parametrize("term", [*losses.PAIR_TERMS.values(), squares])
def test_a_loss_compiled_for_a_gpu_is_the_eager_one(term, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    units = [torch.randn(n, 24, 64, generator=generator) for n in (10, 2)]
    student, teacher = [torch.nn.functional.normalize(x, dim=-1).cuda() for x in units]
    torch.manual_seed(0)
    layers = [WeightNormLinear(64, 8192).cuda() for _ in range(2)]
    given = layers[0], teacher, layers[1], torch.zeros(8192, device="cuda"), (0.1, 0.04), 8
    results = []
    for backends in (["inductor"], []):
        monkeypatch.setattr(compiled, "COMPILERS", dict(zip(["cuda"], backends)))
        x = student.clone().requires_grad_()
        layers[0].zero_grad()
        loss, mean, entropy = fused.prototype_loss(term, x, *given)
        loss.backward()
        results.append([loss.detach(), mean, entropy, x.grad, layers[0].weight_v.grad.clone()])
        assert not compiled.EAGER  # it has not fallen back
    for got, expected in zip(*results):
        assert (got - expected).norm() <= 1e-4 * expected.norm()


def test_no_gradient_reaches_the_teacher():
    teacher = torch.randn(2, B, K, requires_grad=True)
    student = torch.randn(V, B, K, requires_grad=True)
    (
        losses.dino_loss(student, teacher, torch.zeros(K))
        + losses.orthogonality(student, teacher, torch.zeros(K))
    ).backward()
    assert teacher.grad is None and student.grad.abs().sum() > 0


def test_losses_at_the_points_where_they_are_known():
    uniform, certain = torch.zeros(V, B, K), torch.zeros(V, B, K)
    certain[..., 3] = 100.0
    center = torch.zeros(K)
    assert losses.dino_loss(uniform, uniform[:2], center).item() == pytest.approx(math.log(K))
    assert losses.dino_loss(certain, certain[:2], center).item() == pytest.approx(0, abs=1e-6)
    assert losses.orthogonality(certain, certain[:2], center).item() == pytest.approx(1)
    assert losses.orthogonality(uniform, uniform[:2], center).item() == pytest.approx(1 / K)
    assert losses.orthogonality(
        uniform, uniform[:2], center, kind="cosine"
    ).item() == pytest.approx(1)
    other = torch.zeros(2, B, K)
    other[..., 4] = 100.0
    assert losses.orthogonality(certain, other, center).item() == pytest.approx(0, abs=1e-6)


def test_the_pair_of_a_view_with_itself_is_left_out():
    """Only view 0 agrees with teacher view 0: that pair must not count."""
    student, teacher = torch.zeros(2, 1, K), torch.zeros(2, 1, K)
    student[0, 0, 1], teacher[0, 0, 1] = 100.0, 100.0
    student[1, 0, 2], teacher[1, 0, 2] = 100.0, 100.0
    assert losses.orthogonality(student, teacher, torch.zeros(K)).item() == pytest.approx(
        0, abs=1e-6
    )


def test_bfloat16_logits_are_computed_in_float32():
    student, teacher = torch.randn(V, B, K).bfloat16(), torch.randn(2, B, K).bfloat16()
    assert losses.dino_loss(student, teacher, torch.zeros(K)).dtype == torch.float32
    torch.testing.assert_close(
        losses.dino_loss(student, teacher, torch.zeros(K)),
        losses.dino_loss(student.float(), teacher.float(), torch.zeros(K)),
    )


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match=r"dot.*cosine"):
        losses.orthogonality(torch.zeros(V, B, K), torch.zeros(2, B, K), torch.zeros(K), kind="cos")


def test_projection_regularization_counts_every_parameter_and_pushes_the_norms_together():
    torch.manual_seed(0)
    ir, ef = (
        ProjectionHead(8, 12, hidden=16, bottleneck=4),
        ProjectionHead(3, 5, hidden=16, bottleneck=4),
    )
    value = losses.projection_regularization(ir, ef)
    by_hand = abs(
        sum((p.double() ** 2).sum() for p in ef.parameters())
        - sum((p.double() ** 2).sum() for p in ir.parameters())
    )
    assert value.item() == pytest.approx(by_hand.item(), rel=1e-5)
    assert (
        sum(1 for name, _ in ir.named_parameters() if "weight_g" in name) == 1
    )  # the fixed gain is among them
    value.backward()
    sign = 1 if losses.squared_norm(ef) > losses.squared_norm(ir) else -1
    for head, direction in ((ef, sign), (ir, -sign)):
        for p in head.parameters():
            if p.requires_grad:
                torch.testing.assert_close(p.grad, 2 * direction * p.detach())


def test_center_is_the_running_mean():
    center, teacher = torch.randn(K), torch.randn(2, B, K)
    expected = 0.9 * center + 0.1 * teacher.mean((0, 1))
    losses.update_center(center, teacher.mean((0, 1)), 0.9)
    torch.testing.assert_close(center, expected)
