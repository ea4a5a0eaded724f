"""The views against torchvision's operations on one image.

With parameters fixed, pixels agree. With parameters random, distributions agree.

Tolerances: our operations are float32 throughout. Against torchvision's float operations, pixels in
[0, 1] agree to 1e-5. Against torchvision on uint8, which truncates after each operation, they agree
to 2.5 levels of 255 in the mean.
"""

import itertools
import math
from functools import partial

from lib import compiled, processor
from lib.rng import fork, noise, sample_seeds, uniforms

import pytest
import torch
import torchvision.transforms.v2 as T
import torchvision.transforms.v2.functional as TF
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchvision.transforms import InterpolationMode

import augment as A

N, S = 6, 48
SEEDS = sample_seeds(0, torch.arange(N))
OFF = torch.zeros(N, dtype=torch.bool)
NO_ELASTIC = torch.zeros(N)
NO_ROTATION = torch.zeros(N)
ANGLES = torch.tensor([0.0, 30.0, -77.0, 5.0, 90.0, -90.0])
FLIPS = torch.tensor([True, False, True, False, True, False])
ALPHAS = torch.tensor([100.0, 50.0, 0.0, 150.0, 100.0, 0.0])


@pytest.fixture
def x():
    generator = torch.Generator().manual_seed(1)
    return TF.gaussian_blur(torch.rand(N, 3, S, S, generator=generator), [5, 5], [1.0])


def assert_near(got, expected, atol):
    torch.testing.assert_close(got, expected, atol=atol, rtol=0)


def each(function, x, *parameters):
    """Apply a function of one image to every row, with its own parameters."""
    return torch.stack([function(x[i], *(p[i].item() for p in parameters)) for i in range(len(x))])


def on_channels(operation, x, *values):
    """Apply an operation on channels r, g, b to x (N, 3, S, S)."""
    return torch.cat(operation(*x.split(1, dim=1), *values), dim=1)


def rotate(image, degrees):
    return TF.rotate(image, degrees, InterpolationMode.BILINEAR)


def elastic(x, displacement):
    """Deform every row by its row of the displacement (N, S, S, 2), as torchvision does."""
    rows = zip(x, displacement.split(1))
    return torch.stack([TF.elastic(image, d, InterpolationMode.BILINEAR) for image, d in rows])


def jitter(image, order, factors, hue):
    """Apply torchvision's four operations of the color jitter in the order given."""
    operations = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)
    values = [*factors.tolist(), hue.item()]
    for i in order.tolist():
        image = operations[i](image, values[i])
    return image


# --- geometry -------------------------------------------------------------------------------------


def test_flip(x):
    got = A.warp(x.clone(), FLIPS, NO_ROTATION, NO_ELASTIC, SEEDS)
    assert torch.equal(got, torch.where(FLIPS[:, None, None, None], x.flip(-1), x))


def test_rotation(x):
    got = A.warp(x.clone(), OFF, ANGLES, NO_ELASTIC, SEEDS)
    assert_near(got, each(rotate, x, ANGLES), atol=2e-5)


def test_flip_then_rotation(x):
    flipped = torch.where(FLIPS[:, None, None, None], x.flip(-1), x)
    got = A.warp(x.clone(), FLIPS, ANGLES, NO_ELASTIC, SEEDS)
    assert_near(got, each(rotate, flipped, ANGLES), atol=2e-5)


def test_elastic(x):
    displacement = A.elastic_displacement(ALPHAS, SEEDS, S)
    got = A.warp(x.clone(), OFF, NO_ROTATION, ALPHAS, SEEDS)
    assert_near(got, elastic(x, displacement), atol=2e-5)


def test_elastic_displacement_is_torchvisions_smoothed_noise():
    field = noise(SEEDS, 2 * S * S).view(N, 2, S, S)
    expected = TF.gaussian_blur(field, [41, 41], [5.0, 5.0]) * (ALPHAS / S)[:, None, None, None]
    got = A.elastic_displacement(ALPHAS, SEEDS, S)
    torch.testing.assert_close(got, expected.permute(0, 2, 3, 1), atol=1e-6, rtol=1e-4)


def test_composed_grid_is_the_sequence_of_the_two_up_to_its_second_interpolation(x):
    """On smooth pictures one sampling and two differ little.

    The corners that rotation blackens stay black after elastic.
    """
    smooth = TF.gaussian_blur(x, [21, 21], [4.0])
    alphas = torch.full((N,), 100.0)
    displacement = A.elastic_displacement(alphas, SEEDS, S)
    expected = elastic(each(rotate, smooth, ANGLES), displacement)
    got = A.warp(smooth.clone(), OFF, ANGLES, alphas, SEEDS)
    difference = (got - expected).abs()
    assert difference.mean() < 2e-3
    # Largest at the rotated square's edge: there only the sequence has interpolated already.
    assert difference.max() < 0.3


def test_nothing_outside_the_rotated_square_leaks_in():
    """A white image rotated by 90 degrees fills the square exactly.

    So what elastic brings in from outside must be black, as in the sequence.
    """
    white = torch.ones(N, 3, S, S)
    alphas = torch.full((N,), 400.0)
    expected = elastic(white, A.elastic_displacement(alphas, SEEDS, S))
    got = A.warp(white.clone(), OFF, torch.full((N,), 90.0), alphas, SEEDS)
    assert expected.min() == 0  # the case occurs
    assert ((got == 0) == (expected == 0)).float().mean() > 0.999
    assert (got - expected).abs().mean() < 2e-3


# --- blur and color -------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [8, 17, 48])
def test_blur(size):
    x = torch.rand(N, 3, size, size)
    sigma = torch.tensor([0.1, 0.3, 0.7, 1.1, 1.6, 2.0])
    expected = each(lambda image, s: TF.gaussian_blur(image, [13, 13], [s, s]), x, sigma)
    assert_near(on_channels(A.blur, x, sigma), expected, atol=1e-5)


def test_hue(x):
    x[0, :, :9, :9] = 0.5  # gray has no hue
    turns = torch.tensor([0.1, -0.2, 0.0, 0.5, -0.5, 0.03])
    assert_near(on_channels(A.adjust_hue, x, turns), each(TF.adjust_hue, x, turns), atol=1e-5)


def test_color_jitter_in_every_order(x):
    for orders in torch.tensor(list(itertools.permutations(range(4)))).split(N):
        u = uniforms(sample_seeds(5, orders[0, 0], torch.arange(N)), 4)
        factors = 0.6 + 0.8 * u[:, :3]
        hue = 0.4 * u[:, 3] - 0.2
        expected = [jitter(*row) for row in zip(x, orders, factors, hue)]
        got = A.color_jitter(x.split(1, dim=1), factors, hue, orders)
        assert_near(torch.cat(got, dim=1), torch.stack(expected), atol=2e-5)


def test_gray(x):
    assert_near(A.gray(*x.split(1, dim=1)), TF.rgb_to_grayscale(x, 1), atol=1e-6)


def test_solarize_and_normalize():
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(2, 3, 16, 16)
    params = A.parameters(A.PERTURBATIONS["orig"], SEEDS[:2])
    params |= dict(solarize=torch.tensor([True, False]))
    pixels = torch.stack([TF.solarize(images[0], 128), images[1]]).float() / 255
    expected = TF.normalize(pixels, A.MEAN, A.STD)
    torch.testing.assert_close(A.transform(images, params), expected)


def test_denormalize_inverts_normalize(x):
    assert_near(A.denormalize(A.normalize(x)), x, atol=1e-6)
    views = A.normalize(x).unflatten(0, (2, 3))
    assert_near(A.denormalize(views).flatten(0, 1), x, atol=1e-6)


# --- recipes --------------------------------------------------------------------------------------


def test_whole_recipe_is_torchvisions_on_uint8_but_for_its_rounding(x):
    images = (x * 255).round().to(torch.uint8)
    params = A.parameters(A.RECIPES["caug"], sample_seeds(3, torch.arange(N)), A.GLOBAL_2)
    params |= dict(blur=torch.tensor([0.0, 1.0, 0.5, 0.0, 2.0, 0.1]), gray=FLIPS, solarize=OFF)
    expected = []
    for i in range(N):
        image = images[i].flip(-1) if params["flip"][i] else images[i]
        image = rotate(image, params["angle"][i].item())
        image = jitter(image, *(params[name][i] for name in ("order", "factors", "hue")))
        image = TF.rgb_to_grayscale(image, 3) if params["gray"][i] else image
        sigma = params["blur"][i].item()
        image = TF.gaussian_blur(image, [13, 13], [sigma, sigma]) if sigma else image
        expected.append(TF.normalize(image.float() / 255, A.MEAN, A.STD))
    got = A.denormalize(A.transform(images, params))
    difference = (got - A.denormalize(torch.stack(expected))).abs() * 255
    assert difference.mean() < 2.5
    assert difference.quantile(0.999) < 6


@pytest.mark.parametrize("name", [*A.RECIPES, *A.PERTURBATIONS])
@pytest.mark.parametrize("kind", [A.GLOBAL_1, A.GLOBAL_2, A.LOCAL])
def test_parameters_have_the_recipes_frequencies_and_ranges(name, kind):
    recipe = (A.RECIPES | A.PERTURBATIONS)[name]
    p = A.parameters(recipe, sample_seeds(1, torch.arange(20000)), kind)
    jittered = (p["factors"] != 1).any(1)
    for got, expected in (
        (p["flip"], recipe.flip),
        (p["elastic"] > 0, recipe.elastic),
        (jittered, recipe.jitter),
        (p["gray"], recipe.gray),
        (p["blur"] > 0, recipe.blur[kind]),
        (p["solarize"], recipe.solarize[kind]),
    ):
        assert abs(got.float().mean() - expected) < 0.015
    assert p["angle"].abs().max() <= recipe.rotate
    assert abs(p["angle"].std() - recipe.rotate / 3**0.5) < 0.02 * recipe.rotate + 1e-6
    assert set(p["elastic"].unique().tolist()) <= {0, recipe.elastic_alpha}
    if recipe.jitter:
        check_jitter(p["factors"][jittered], p["hue"], recipe.jitter_strength)
    orders = (p["order"] * torch.tensor([64, 16, 4, 1])).sum(1).unique(return_counts=True)[1]
    assert len(orders) == 24
    assert orders.min() > 600  # of 833 expected
    sigma = p["blur"][p["blur"] > 0]
    if len(sigma):
        assert sigma.min() >= 0.1
        assert sigma.max() <= 2
        assert abs(sigma.mean() - 1.05) < 0.05


def check_jitter(factors, hue, strengths):
    """Check that factors are uniform in 1 - strength .. 1 + strength, and the range of hue."""
    for f, strength in zip(factors.unbind(1), strengths):
        assert f.min() >= 1 - strength
        assert f.max() <= 1 + strength
        assert abs(f.mean() - 1) < 0.01
        assert abs(f.std() - strength / 3**0.5) < 0.01
    assert hue.abs().max() <= strengths[3] + 1e-6


def test_perturbations_are_what_method_md_says():
    table = A.PERTURBATIONS
    assert table["cj"].jitter == 1
    assert table["cj"].jitter_strength == (0.4, 0.4, 0.4, 0.1)
    assert table["cj"].rotate == 0
    assert table["cj+ro"].rotate == 90
    assert table["cj+ro+et"].elastic == 1
    assert table["cj+flip"].flip == 1
    assert table["orig"] == A.Recipe()


def test_recipe_switches_blur_and_solarize_off_and_nothing_else():
    off = (0.0, 0.0, 0.0)
    for name, entry in A.RECIPES.items():
        assert A.recipe(name) == entry
        assert A.recipe(name, blur=False) == entry._replace(blur=off)
        assert A.recipe(name, solarize=False) == entry._replace(solarize=off)
        assert A.recipe(name, blur=False, solarize=False)[:-2] == entry[:-2]


def test_a_perturbation_is_a_function_of_the_image_seed_and_its_own():
    images = torch.randint(0, 256, (N, 3, S, S), dtype=torch.uint8)
    got = A.perturbation("cj+ro+et", 4)(images, SEEDS)
    seeds = fork(SEEDS, "perturbation", 4)
    assert torch.equal(got, A.augment(images, A.PERTURBATIONS["cj+ro+et"], seeds))
    assert not torch.allclose(got, A.perturbation("cj+ro+et", 5)(images, SEEDS))


@pytest.mark.parametrize("n", range(4))
def test_quarter_turn_is_exact(n):
    images = torch.randint(0, 256, (N, 3, S, S), dtype=torch.uint8)
    upright = A.normalize(images.float() / 255)
    assert torch.equal(A.quarter_turn(n)(images, SEEDS), torch.rot90(upright, n, (2, 3)))


# --- crops ----------------------------------------------------------------------------------------


def test_crop_boxes_have_torchvisions_distribution():
    ours = A.crop_boxes(60, 90, torch.tensor(2), 4000, (0.05, 0.4)).float()
    torch.manual_seed(0)
    transform = T.RandomResizedCrop(8, scale=(0.05, 0.4))
    image = torch.zeros(3, 60, 90)
    boxes = [transform.make_params([image]) for _ in range(4000)]
    theirs = [[box[name] for name in ("top", "left", "height", "width")] for box in boxes]
    theirs = torch.tensor(theirs, dtype=torch.float)
    for column in range(4):
        spread = theirs[:, column].std()
        assert abs(ours[:, column].mean() - theirs[:, column].mean()) < 0.1 * spread
        assert abs(ours[:, column].std() - spread) < 0.1 * spread


@pytest.mark.parametrize("H, W", [(1, 1), (1, 300), (300, 1), (7, 20), (20000, 20)])
def test_crops_of_extreme_images_lie_inside(H, W):
    boxes = A.crop_boxes(H, W, torch.tensor(2), 50, (0.4, 1.0)).tolist()
    assert len(boxes) == 50
    for top, left, h, w in boxes:
        assert min(top, left) >= 0
        assert min(h, w) > 0
        assert top + h <= H
        assert left + w <= W


def test_resize_is_torchvisions_antialiased_bicubic():
    image = torch.randint(0, 256, (3, 90, 70), dtype=torch.uint8)
    expected = TF.resize(image, [32, 32], InterpolationMode.BICUBIC, antialias=True)
    assert torch.equal(A.resize(image, 32, 32), expected)


@pytest.mark.parametrize("H, W", [(224, 224), (500, 375), (200, 900), (64, 64), (1, 1), (3, 1000)])
def test_center_crop_is_square_and_loses_no_border_of_small_images(H, W):
    image = torch.randint(0, 256, (3, H, W), dtype=torch.uint8)
    assert A.center_crop(image, 224).shape == (3, 224, 224)
    if H == W == 64:
        assert torch.equal(A.center_crop(image, 64), image)


# --- batches --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", A.RECIPES)
def test_views_do_not_depend_on_the_batch_they_are_in(name):
    images = torch.randint(0, 256, (N, 3, S, S), dtype=torch.uint8)
    whole = A.augment(images, A.RECIPES[name], SEEDS, A.LOCAL)
    rows = zip(images.split(1), SEEDS.split(1))
    alone = [A.augment(image, A.RECIPES[name], seed, A.LOCAL) for image, seed in rows]
    torch.testing.assert_close(whole, torch.cat(alone), atol=1e-5, rtol=1e-5)


def test_a_cpu_transforms_chunks_as_a_gpu_the_whole_batch(monkeypatch):
    images = torch.randint(0, 256, (N, 3, S, S), dtype=torch.uint8)
    whole = A.transform(images, A.parameters(A.RECIPES["caug+"], SEEDS))
    for pixels in (1, 2 * S * S, 4 * S * S):  # 1, 2 and 4 images at a time; 4 leaves a rest
        monkeypatch.setattr(A, "CPU_CHUNK", pixels)
        got = A.augment(images, A.RECIPES["caug+"], SEEDS)
        torch.testing.assert_close(got, whole, atol=1e-5, rtol=1e-5)
    assert A.augment(images[:0], A.RECIPES["caug+"], SEEDS[:0]).shape == (0, 3, S, S)


def test_augment_views_gives_every_crop_random_numbers_of_its_own():
    crop = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8)
    global_crops = crop.expand(N, 2, -1, -1, -1).contiguous()
    local_crops = crop.expand(N, 3, -1, -1, -1).contiguous()
    large, small = A.augment_views(global_crops, local_crops, SEEDS, A.RECIPES["caug"])
    assert large.shape == (2, N, 3, 32, 32)
    assert small.shape == (3, N, 3, 32, 32)
    everything = torch.cat([large, small]).flatten(0, 1).flatten(1)
    assert everything.unique(dim=0).shape[0] == 5 * N
    alone = A.augment_views(global_crops, local_crops[:, :0], SEEDS, A.RECIPES["caug"])
    assert len(alone) == 1


def test_a_crop_transform_takes_random_numbers_of_the_sample_alone():
    """Each crop has its own; neither the batch nor torch's generator plays a part."""
    recipe = A.Recipe(crop_transform=T.RandomErasing(p=1.0))
    images = torch.full((N, 3, S, S), 200, dtype=torch.uint8)
    state = torch.get_rng_state()
    got = A.augment(images, recipe, SEEDS)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    assert torch.equal(A.augment(images[2:4], recipe, SEEDS[2:4]), got[2:4])
    assert got.flatten(1).unique(dim=0).shape[0] == N and (images == 200).all()


def test_a_crop_transform_may_return_floats_and_change_its_input():
    def negative(crop):
        return 1 - crop.mul_(1).float() / 255

    images = torch.randint(0, 256, (N, 3, S, S), dtype=torch.uint8)
    got = A.augment(images, A.Recipe(crop_transform=negative), SEEDS)
    assert_near(A.denormalize(got), 1 - images.float() / 255, atol=1 / 255)


# --- as a GPU does it: by masks, one copy, one graph ----------------------------------------------

ALL = A.RECIPES | A.PERTURBATIONS
KERNELS = 30  # more than torch.compile makes of a size of views, on a GPU


def some_crops(sizes, device="cpu", n=N):
    """Make crops as loaders give them, (n, V, 3, S, S) for each V, S; a part is white."""
    crops = [torch.randint(0, 256, (n, V, 3, S, S), dtype=torch.uint8) for V, S in sizes]
    for some in crops:
        some[..., : some.shape[-1] // 2, :] = 255
    return [some.to(device) for some in crops]


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("kind", [A.GLOBAL_1, A.GLOBAL_2, A.LOCAL])
@pytest.mark.slow
def test_masks_choose_what_rows_compute(name, kind):
    """So it is for any numbers, and where all samples or none have an operation."""
    [crops] = some_crops([(24, 40)], n=1)
    for seed in range(3):
        params = A.parameters(ALL[name], sample_seeds(seed, torch.arange(24)), kind)
        for rows in (slice(0, 24), slice(5, 6)):
            some = {key: p[rows] for key, p in params.items()}
            by_rows = A.transform(crops[0, rows], some)
            by_masks = A.transform(crops[0, rows], A._in_use(some, ALL[name]), masked=True)
            assert_near(by_masks, by_rows, atol=1e-5)


def test_masks_hold_for_single_operations():
    """For recipes that have elastic without rotation, rotation or blur alone, and so on."""
    [crops] = some_crops([(1, 32)])
    strong = dict(flip=0.5, rotate=30.0, elastic=0.5, jitter=0.5, gray=0.5, blur=(0.5,) * 3)
    for name, value in (strong | dict(solarize=(0.5,) * 3)).items():
        recipe = A.Recipe(**{name: value})
        params = A.parameters(recipe, SEEDS)
        by_masks = A.transform(crops[:, 0], A._in_use(params, recipe), masked=True)
        assert_near(by_masks, A.transform(crops[:, 0], params), atol=1e-5)


def test_views_of_a_batch_are_those_of_each_kind(name="caug+"):
    crops = some_crops([(2, 48), (3, 32)])
    large, small = A.augment_views(*crops, SEEDS, A.RECIPES[name])
    for i, kind in enumerate([A.GLOBAL_1, A.GLOBAL_2]):
        seeds = fork(SEEDS, "global_view", index=i)
        expected = A.augment(crops[0][:, i], A.RECIPES[name], seeds, kind)
        assert torch.equal(large[i], expected)
    for i in range(3):
        seeds = fork(SEEDS, "local_view", index=i)
        expected = A.augment(crops[1][:, i], A.RECIPES[name], seeds, A.LOCAL)
        assert_near(small[i], expected, atol=1e-5)


@pytest.fixture
def fresh_compiler(monkeypatch):
    monkeypatch.setattr(compiled, "EAGER", set())
    torch._dynamo.reset()
    compiled._compile.cache_clear()
    yield
    torch._dynamo.reset()
    compiled._compile.cache_clear()


@pytest.mark.parametrize("name", A.RECIPES)
@pytest.mark.slow
def test_views_of_a_gpu_on_a_cpu(name, monkeypatch, fresh_compiler):
    """All that a GPU does but the transfer: the same views, by one graph for each size."""
    recipe, graphs = A.RECIPES[name], []
    compilers = {"cpu": lambda graph, _: graphs.append(graph) or graph.forward}
    monkeypatch.setattr(compiled, "COMPILERS", compilers)
    large, small = some_crops([(2, 32), (3, 16)])
    for seed in range(3):
        seeds = sample_seeds(seed, torch.arange(N))
        results = []
        for devices in ({"cpu"}, set()):
            monkeypatch.setattr(A, "BY_ROWS", devices)
            views = A.augment_views(large, small, seeds, recipe)
            views += A.augment_views(large, small[:, :0], seeds, recipe)
            results.append([*views, A.augment(small[:, 0], recipe, seeds, A.LOCAL)])
        assert len(results[1]) == 4
        for by_rows, by_masks in zip(*results):
            assert_near(by_masks, by_rows, atol=1e-5)
    assert not compiled.EAGER  # nothing failed
    assert len(graphs) == 2


@pytest.mark.parametrize("suppress_errors", [False, True])
def test_without_a_compiler_views_are_eager(suppress_errors, monkeypatch, capsys, fresh_compiler):
    """A line says why."""

    def refuse(graph, _):
        raise RuntimeError("no such\ninstruction")

    crops = some_crops([(2, 32), (1, 16)])
    expected = A.augment_views(*crops, SEEDS, A.RECIPES["baug"])
    monkeypatch.setattr(A, "BY_ROWS", set())
    monkeypatch.setattr(compiled, "COMPILERS", {"cpu": refuse})
    with torch._dynamo.config.patch(suppress_errors=suppress_errors):
        for _ in range(2):
            for got, view in zip(A.augment_views(*crops, SEEDS, A.RECIPES["baug"]), expected):
                assert_near(got, view, atol=1e-5)
    line = capsys.readouterr().out
    assert line.startswith("views are not compiled: ") and "no such instruction" in line
    assert line.count("\n") == 1


class Count(TorchDispatchMode):
    """Count operations of the host alone, of the device (meta), and what the latter move."""

    def __init__(self):
        super().__init__()
        self.host = self.device = self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, torch.Tensor)]
        on_device = any(x.is_meta for x in tensors)
        self.host += not on_device
        self.device += on_device
        if on_device and not function.is_view:
            self.bytes += sum(map(self.size, tensors))
        return result

    @staticmethod
    def size(x):
        """Return the bytes of a tensor in memory, once where it is expanded."""
        sizes = [n for n, stride in zip(x.shape, x.stride()) if stride]
        return math.prod(sizes) * x.itemsize


@pytest.mark.parametrize("name", A.RECIPES)
@pytest.mark.parametrize("n", [1, 128])
def test_views_of_a_gpu_are_one_copy_and_few_operations(name, n, monkeypatch):
    """On tensors without numbers: so no branch and no shape depends on them, and nothing waits."""
    copies, graphs = [], []
    monkeypatch.setattr(processor, "to_device", lambda device, x: copies.append(x) or x.to(device))
    crops = [torch.empty(n, 2, 3, 224, 224), torch.empty(n, 8, 3, 96, 96)]
    crops = [some.to("meta", torch.uint8) for some in crops]
    seeds = sample_seeds(0, torch.arange(n))
    with Count() as eager:
        views = A.augment_views(*crops, seeds, A.RECIPES[name])
    assert [x.shape for x in views] == [(2, n, 3, 224, 224), (8, n, 3, 96, 96)]
    assert len(copies) == 1
    assert copies[0].dtype == torch.uint8 and copies[0].numel() < 100 * 10 * n
    assert eager.host < 400 and eager.device < 1200  # GPUs without a compiler, and evaluations

    def one_graph(what, function, images, params, masked):
        graphs.append(function)
        return torch.empty_like(images, dtype=torch.float32)

    monkeypatch.setattr(A, "run_compiled", one_graph)
    with Count() as count:
        A.augment_views(*crops, seeds, A.RECIPES[name])
    assert count.host + count.device + len(graphs) * KERNELS < 700
    assert graphs == [A.transform] * 2
    assert count.bytes < 1e7 * n  # the crops, view by view


def test_a_packed_copy_is_what_it_was(monkeypatch):
    tensors = dict(
        mask=torch.tensor([True, False, True]),
        seeds=SEEDS,
        angle=torch.linspace(-1, 1, 7).expand(3, 7).T,
        none=torch.zeros(0, 3),
        order=torch.arange(12).view(3, 4),
    )
    copies = []
    monkeypatch.setattr(processor, "to_device", lambda device, x: copies.append(x) or x.clone())
    got = processor.copy_packed(torch.device("cpu"), tensors)
    assert len(copies) == 1 and got.keys() == tensors.keys()
    for name, x in tensors.items():
        assert torch.equal(got[name], x) and got[name].dtype == x.dtype
        assert got[name].data_ptr() % x.itemsize == 0
    assert processor.copy_packed(torch.device("cpu"), {}) == {} and len(copies) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("name", ALL)
def test_device_views_equal_cpu_views(name):
    images = torch.randint(0, 256, (64, 3, 96, 96), dtype=torch.uint8)
    seeds = sample_seeds(0, torch.arange(64))
    on_cpu = A.augment(images, ALL[name], seeds, A.LOCAL)
    on_gpu = A.augment(images.cuda(), ALL[name], seeds, A.LOCAL)
    assert (on_cpu - on_gpu.cpu()).abs().quantile(0.999) < 1e-3


@pytest.mark.gpu
@pytest.mark.parametrize("name", A.RECIPES)
def test_compiled_views_of_a_gpu(name, fresh_compiler):
    """They are the CPU's, made by few kernels, and nothing waits for the GPU."""
    crops = some_crops([(2, 96), (3, 48)], n=16)
    there = [some.cuda() for some in crops]
    make = partial(A.augment_views, recipe=A.RECIPES[name])
    for seed in range(2):
        seeds = sample_seeds(seed, torch.arange(16))
        torch.cuda.set_sync_debug_mode("error" if seed else "default")  # the first one compiles
        views = make(*there, seeds)
        torch.cuda.set_sync_debug_mode("default")
        assert not compiled.EAGER  # nothing failed
        for got, expected in zip(views, make(*crops, seeds)):
            assert (got.cpu() - expected).abs().quantile(0.999) < 1e-3
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        make(*there, seeds)
        torch.cuda.synchronize()
    kernels = [event for event in profile.events() if event.device_type.name == "CUDA"]
    assert len(kernels) < 2 * KERNELS + 10, [event.name for event in kernels]
