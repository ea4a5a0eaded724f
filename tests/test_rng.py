"""Random numbers: functions of their counters, uniform, and unlike their neighbors'."""

from lib.rng import _GOLDEN, _mix, fork, noise, sample_seeds, uniforms

import torch
from torch.fx.experimental.proxy_tensor import make_fx


def test_a_number_depends_on_its_counters_alone():
    together = uniforms(sample_seeds(7, 3, torch.arange(100)), 5)
    alone = uniforms(sample_seeds(7, 3, 42), 5)
    assert torch.equal(together[42], alone)
    assert not torch.equal(uniforms(sample_seeds(7, 4, 42), 5), alone)
    assert not torch.equal(uniforms(sample_seeds(8, 3, 42), 5), alone)
    # The order of the counters matters. Asking for more numbers changes nothing.
    assert not torch.equal(uniforms(sample_seeds(3, 7, 42), 5), alone)
    assert torch.equal(uniforms(sample_seeds(7, 3, 42), 9)[:5], alone)


def test_uniforms_and_noise_have_the_moments_of_their_distributions():
    seeds = sample_seeds(0, torch.arange(2000))
    for numbers, mean, std in (
        (uniforms(seeds, 500), 0.5, 12**-0.5),
        (noise(seeds, 501), 0, 3**-0.5),
    ):
        assert abs(numbers.mean() - mean) < 0.002
        assert abs(numbers.std() - std) < 0.002
        assert numbers.min() >= mean - std * 3**0.5 - 1e-6
        assert numbers.max() < mean + std * 3**0.5 + 1e-6
        of_columns = torch.corrcoef(numbers[:, :40].T) - torch.eye(40)
        assert of_columns.abs().max() < 0.1
        of_neighbors = torch.corrcoef(numbers[:40]) - torch.eye(40)  # samples
        assert of_neighbors.abs().max() < 0.25


def test_sample_seeds_do_not_collide():
    samples = torch.arange(1000)
    seeds = sample_seeds(torch.arange(10)[:, None, None], torch.arange(30)[:, None], samples)
    assert seeds.unique().numel() == seeds.numel()


def assert_distinct(*seeds):
    """Check that no two of all the seeds, tensors of any shapes, are equal."""
    seeds = torch.cat([tensor.flatten() for tensor in seeds])
    assert seeds.unique().numel() == seeds.numel()


def test_streams_of_a_sample_seed_do_not_collide():
    """Compare every seed that numbers are made of, with 80 local crops and 10 perturbations.

    Two entries of the table may overlap: local_view + 8 is perturbation, which is hashed with one
    counter more, and local_view + 18 is quarter_turn, which is not hashed again.
    """
    seeds = sample_seeds(0, torch.arange(3)[:, None], torch.arange(50))[..., None]
    crops, repeats = torch.arange(80), torch.arange(10)
    views = [
        seeds,  # of evaluations, which have one view
        fork(seeds, "global_view", index=torch.arange(2)),
        fork(seeds, "local_view", index=crops),
        fork(seeds, "perturbation", repeats),
    ]
    assert_distinct(
        sample_seeds(fork(seeds, "global_crops"), torch.arange(2)),
        sample_seeds(fork(seeds, "local_crops"), crops),
        *(fork(view, stream) for view in views for stream in ("augment", "elastic")),
        *(fork(seeds, "crop_transform", kind, crops) for kind in range(2)),
        fork(seeds, "quarter_turn"),
        fork(seeds, "drop_path", index=torch.arange(2 + 80)),
    )


def test_streams_of_a_run_seed_do_not_collide():
    """Compare the seeds of built-in images and videos, and of cached views in evaluations."""
    index, few = torch.arange(500)[:, None], torch.arange(16)
    train, val = (fork(0, f"shapes_{split}", index) for split in ("train", "val"))
    objects = fork(0, "video", index, few)
    frames = fork(0, "video_grain", index, few)
    assert_distinct(
        *(train, val, objects),  # what a shape looks like
        *(fork(seeds, "grain") for seeds in (train, val, frames)),
        fork(objects, "motion"),
        fork(0, "cached_view", few, index),  # epoch, image
    )


def test_splitmix64_itself():
    """The published sequence of splitmix64 for seed 1234567: ours is the same, bit for bit."""
    state = torch.tensor(1234567) + _GOLDEN * torch.arange(1, 6)
    expected = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert [int(h) % 2**64 for h in _mix(state)] == expected


def test_noise_multiplies_no_counter_alone():
    """A GPU kernel of torch.compile would compute such a product with 32 bits."""
    graph = make_fx(lambda seeds: noise(seeds, 100))(sample_seeds(3, torch.arange(9))).graph
    products = [node for node in graph.nodes if node.target == torch.ops.aten.mul.Tensor]
    assert products
    for node in products:
        assert not any(x.name.startswith("arange") for x in node.all_input_nodes)
