"""The views against torchvision's per-image operations: parameters fixed, pixels agree; parameters free, distributions agree.

Tolerances: our chain is float32 throughout, so against torchvision's float operations pixels in [0, 1] agree to 1e-5; against the uint8
pipeline, which truncates after each operation, to 2.5 levels of 255 in the mean."""

import pytest
import torch
import torchvision.transforms.v2 as T
import torchvision.transforms.v2.functional as TF
from torchvision.transforms import InterpolationMode

import augment as A
from draws import key, uniforms

N, S = 6, 48
KEYS = key(0, torch.arange(N))


@pytest.fixture
def x():
    generator = torch.Generator().manual_seed(1)
    return TF.gaussian_blur(torch.rand(N, 3, S, S, generator=generator), [5, 5], [1.0])


def each(function, x, *parameters):
    return torch.stack([function(x[i], *(p[i].item() for p in parameters)) for i in range(len(x))])


def rotate(image, degrees):
    return TF.rotate(image, degrees, InterpolationMode.BILINEAR)


OFF, NO_ELASTIC = torch.zeros(N, dtype=torch.bool), torch.zeros(N)
ANGLES = torch.tensor([0.0, 30.0, -77.0, 5.0, 90.0, -90.0])
FLIPS = torch.tensor([True, False, True, False, True, False])
ALPHAS = torch.tensor([100.0, 50.0, 0.0, 150.0, 100.0, 0.0])


def test_flip(x):
    assert torch.equal(
        A.warp(x.clone(), FLIPS, torch.zeros(N), NO_ELASTIC, KEYS),
        torch.where(FLIPS[:, None, None, None], x.flip(-1), x),
    )


def test_rotation(x):
    torch.testing.assert_close(
        A.warp(x.clone(), OFF, ANGLES, NO_ELASTIC, KEYS), each(rotate, x, ANGLES), atol=2e-5, rtol=0
    )


def test_flip_then_rotation(x):
    flipped = torch.where(FLIPS[:, None, None, None], x.flip(-1), x)
    torch.testing.assert_close(
        A.warp(x.clone(), FLIPS, ANGLES, NO_ELASTIC, KEYS),
        each(rotate, flipped, ANGLES),
        atol=2e-5,
        rtol=0,
    )


def test_elastic(x):
    displacement = A.elastic_displacement(ALPHAS, KEYS, S)
    expected = torch.stack(
        [TF.elastic(x[i], displacement[i : i + 1], InterpolationMode.BILINEAR) for i in range(N)]
    )
    torch.testing.assert_close(
        A.warp(x.clone(), OFF, torch.zeros(N), ALPHAS, KEYS), expected, atol=2e-5, rtol=0
    )


def test_elastic_displacement_is_torchvisions_smoothed_noise():
    from draws import noise

    field = noise(KEYS, 2 * S * S).view(N, 2, S, S)
    expected = TF.gaussian_blur(field, [41, 41], [5.0, 5.0]) * (ALPHAS / S)[:, None, None, None]
    torch.testing.assert_close(
        A.elastic_displacement(ALPHAS, KEYS, S), expected.permute(0, 2, 3, 1), atol=1e-6, rtol=1e-4
    )


def test_composed_grid_is_the_sequence_of_the_two_up_to_its_second_interpolation(x):
    """On smooth pictures one gather and two differ little; the corners that rotation blackens stay black after elastic."""
    smooth = TF.gaussian_blur(x, [21, 21], [4.0])
    alphas = torch.full((N,), 100.0)
    displacement = A.elastic_displacement(alphas, KEYS, S)
    rotated = each(rotate, smooth, ANGLES)
    expected = torch.stack(
        [
            TF.elastic(rotated[i], displacement[i : i + 1], InterpolationMode.BILINEAR)
            for i in range(N)
        ]
    )
    got = A.warp(smooth.clone(), OFF, ANGLES, alphas, KEYS)
    assert (got - expected).abs().mean() < 2e-3
    assert (
        (got - expected).abs().max() < 0.3
    )  # at the rotated square's edge, where the one interpolates and the other already has


def test_nothing_outside_the_rotated_square_leaks_in():
    """White image, rotation by 90: it fills the square exactly, so what elastic brings in from outside must be black, as in the sequence."""
    white = torch.ones(N, 3, S, S)
    alphas, angles = torch.full((N,), 400.0), torch.full((N,), 90.0)
    displacement = A.elastic_displacement(alphas, KEYS, S)
    expected = torch.stack(
        [
            TF.elastic(white[i], displacement[i : i + 1], InterpolationMode.BILINEAR)
            for i in range(N)
        ]
    )
    got = A.warp(white.clone(), OFF, angles, alphas, KEYS)
    assert expected.min() == 0  # the case occurs
    assert ((got == 0) == (expected == 0)).float().mean() > 0.999 and (
        got - expected
    ).abs().mean() < 2e-3


@pytest.mark.parametrize("size", [8, 17, 48])
def test_blur(size):
    x = torch.rand(N, 3, size, size)
    sigma = torch.tensor([0.1, 0.3, 0.7, 1.1, 1.6, 2.0])
    expected = each(lambda image, s: TF.gaussian_blur(image, [13, 13], [s, s]), x, sigma)
    torch.testing.assert_close(A.blur(x, sigma), expected, atol=1e-5, rtol=0)


def test_hue(x):
    x[0, :, :9, :9] = 0.5  # grey has no hue
    turns = torch.tensor([0.1, -0.2, 0.0, 0.5, -0.5, 0.03])
    torch.testing.assert_close(
        A.turn_hue(x, turns), each(TF.adjust_hue, x, turns), atol=1e-5, rtol=0
    )


def test_color_jitter_in_every_order(x):
    import itertools

    operations = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)
    for chunk in torch.tensor(list(itertools.permutations(range(4)))).split(N):
        u = uniforms(key(5, chunk[0, 0], torch.arange(N)), 4)
        factors, hue = 0.6 + 0.8 * u[:, :3], 0.4 * u[:, 3] - 0.2
        expected = []
        for i, order in enumerate(chunk.tolist()):
            image = x[i]
            for operation in order:
                image = operations[operation](
                    image, [*factors[i].tolist(), hue[i].item()][operation]
                )
            expected.append(image)
        torch.testing.assert_close(
            A.color_jitter(x, factors, hue, chunk), torch.stack(expected), atol=2e-5, rtol=0
        )


def test_grey(x):
    torch.testing.assert_close(A.grey(x), TF.rgb_to_grayscale(x, 1), atol=1e-6, rtol=0)


def test_whole_chain_is_torchvisions_on_uint8_but_for_its_rounding(x):
    images = (x * 255).round().to(torch.uint8)
    params = A.parameters(A.RECIPES["caug"], key(3, torch.arange(N)), A.GLOBAL_2)
    params |= dict(blur=torch.tensor([0.0, 1.0, 0.5, 0.0, 2.0, 0.1]), grey=FLIPS, solarize=OFF)
    operations = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)
    expected = []
    for i in range(N):
        image = images[i].flip(-1) if params["flip"][i] else images[i]
        image = rotate(image, params["angle"][i].item())
        for operation in params["order"][i].tolist():
            image = operations[operation](
                image, [*params["factors"][i].tolist(), params["hue"][i].item()][operation]
            )
        image = TF.rgb_to_grayscale(image, 3) if params["grey"][i] else image
        sigma = params["blur"][i].item()
        image = TF.gaussian_blur(image, [13, 13], [sigma, sigma]) if sigma else image
        expected.append(TF.normalize(image.float() / 255, A.MEAN, A.STD))
    difference = (
        A.denormalize(A.transform(images, params)) - A.denormalize(torch.stack(expected))
    ).abs() * 255
    assert difference.mean() < 2.5 and difference.quantile(0.999) < 6


def test_solarize_and_normalize():
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(2, 3, 16, 16)
    none = {
        name: value[:2] * 0 if value.dtype != torch.int64 else value[:2]
        for name, value in A.parameters(A.PERTURBATIONS["orig"], KEYS).items()
    }
    params = none | dict(factors=torch.ones(2, 3), solarize=torch.tensor([True, False]))
    expected = TF.normalize(
        torch.stack([TF.solarize(images[0], 128), images[1]]).float() / 255, A.MEAN, A.STD
    )
    torch.testing.assert_close(A.transform(images, params), expected)


@pytest.mark.parametrize("name", [*A.RECIPES, *A.PERTURBATIONS])
def test_parameters_have_the_recipes_frequencies_and_ranges(name):
    recipe = (A.RECIPES | A.PERTURBATIONS)[name]
    keys = key(1, torch.arange(20000))
    for kind in (A.GLOBAL_1, A.GLOBAL_2, A.LOCAL):
        p = A.parameters(recipe, keys, kind)
        jittered = (p["factors"] != 1).any(1)
        for got, expected in (
            (p["flip"], recipe.flip),
            (p["elastic"] > 0, recipe.elastic),
            (jittered, recipe.jitter),
            (p["grey"], recipe.grey),
            (p["blur"] > 0, recipe.blur[kind]),
            (p["solarize"], recipe.solarize[kind]),
        ):
            assert abs(got.float().mean() - expected) < 0.015
        assert (
            p["angle"].abs().max() <= recipe.rotate
            and abs(p["angle"].std() - recipe.rotate / 3**0.5) < 0.02 * recipe.rotate + 1e-6
        )
        if recipe.jitter:
            for j, strength in enumerate(recipe.jitter_strength[:3]):
                f = p["factors"][jittered, j]
                assert (
                    f.min() >= 1 - strength
                    and f.max() <= 1 + strength
                    and abs(f.mean() - 1) < 0.01
                    and abs(f.std() - strength / 3**0.5) < 0.01
                )
            assert p["hue"].abs().max() <= recipe.jitter_strength[3] + 1e-6
        orders = (p["order"] * torch.tensor([64, 16, 4, 1])).sum(1).unique(return_counts=True)[1]
        assert len(orders) == 24 and orders.min() > 600  # of 833 expected
        blurred = p["blur"][p["blur"] > 0]
        assert len(blurred) == 0 or (
            blurred.min() >= 0.1 and blurred.max() <= 2 and abs(blurred.mean() - 1.05) < 0.05
        )


def test_crop_boxes_have_torchvisions_distribution():
    image = torch.zeros(3, 60, 90)
    ours = torch.tensor(
        A.crop_boxes(60, 90, uniforms(key(2, torch.arange(4000)), 22), (0.05, 0.4)),
        dtype=torch.float,
    )
    torch.manual_seed(0)
    transform = T.RandomResizedCrop(8, scale=(0.05, 0.4))
    theirs = [transform.make_params([image]) for _ in range(4000)]
    theirs = torch.tensor(
        [[p["top"], p["left"], p["height"], p["width"]] for p in theirs], dtype=torch.float
    )
    for column in range(4):
        spread = theirs[:, column].std()
        assert abs(ours[:, column].mean() - theirs[:, column].mean()) < 0.1 * spread
        assert abs(ours[:, column].std() - spread) < 0.1 * spread


@pytest.mark.parametrize("H, W", [(1, 1), (1, 300), (300, 1), (7, 20), (20000, 20)])
def test_crops_of_extreme_images_lie_inside(H, W):
    boxes = A.crop_boxes(H, W, uniforms(key(2, torch.arange(50)), 22), (0.4, 1.0))
    assert all(
        h > 0 and w > 0 and top >= 0 and left >= 0 and top + h <= H and left + w <= W
        for top, left, h, w in boxes
    )


def test_resize_is_torchvisions_antialiased_bicubic():
    image = torch.randint(0, 256, (3, 90, 70), dtype=torch.uint8)
    assert torch.equal(
        A.resize(image, 32, 32),
        TF.resize(image, [32, 32], InterpolationMode.BICUBIC, antialias=True),
    )


@pytest.mark.parametrize("H, W", [(224, 224), (500, 375), (200, 900), (64, 64), (1, 1), (3, 1000)])
def test_center_crop_is_square_and_loses_no_border_of_small_images(H, W):
    image = torch.randint(0, 256, (3, H, W), dtype=torch.uint8)
    assert A.center_crop(image, 224).shape == (3, 224, 224)
    if H == W == 64:
        assert torch.equal(A.center_crop(image, 64), image)


def test_views_do_not_depend_on_the_batch_they_are_in():
    images = torch.randint(0, 256, (N, 3, S, S), dtype=torch.uint8)
    for name in A.RECIPES:
        whole = A.augment(images, A.RECIPES[name], KEYS, A.LOCAL)
        alone = torch.cat(
            [
                A.augment(images[i : i + 1], A.RECIPES[name], KEYS[i : i + 1], A.LOCAL)
                for i in range(N)
            ]
        )
        torch.testing.assert_close(whole, alone, atol=1e-5, rtol=1e-5)


def test_augment_views_gives_every_crop_draws_of_its_own():
    crops = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
    one, two = A.augment_views(
        crops[None].expand(N, 2, -1, -1, -1).contiguous(),
        crops[None].expand(N, 3, -1, -1, -1).contiguous(),
        KEYS,
        A.CAUG,
    )
    assert one.shape == (2, N, 3, 32, 32) and two.shape == (3, N, 3, 32, 32)
    everything = torch.cat([one, two]).flatten(0, 1).flatten(1)
    assert everything.unique(dim=0).shape[0] == 5 * N
    assert (
        len(
            A.augment_views(
                crops[None].expand(N, 2, -1, -1, -1),
                crops[None].expand(N, 1, -1, -1, -1)[:, :0],
                KEYS,
                A.CAUG,
            )
        )
        == 1
    )


@pytest.mark.gpu
def test_device_views_equal_cpu_views():
    images = torch.randint(0, 256, (64, 3, 96, 96), dtype=torch.uint8)
    keys = key(0, torch.arange(64))
    for name in A.RECIPES:
        on_cpu, on_gpu = (
            A.augment(images, A.RECIPES[name], keys, A.LOCAL),
            A.augment(images.cuda(), A.RECIPES[name], keys, A.LOCAL),
        )
        assert (on_cpu - on_gpu.cpu()).abs().quantile(0.999) < 1e-3
