"""Draws: functions of their counters, uniform, and unlike their neighbours."""

import torch

from draws import key, noise, uniforms


def test_a_draw_depends_on_its_counters_alone():
    together = uniforms(key(7, 3, torch.arange(100)), 5)
    alone = uniforms(key(7, 3, 42), 5)
    assert torch.equal(together[42], alone)
    assert not torch.equal(uniforms(key(7, 4, 42), 5), alone) and not torch.equal(
        uniforms(key(8, 3, 42), 5), alone
    )
    assert not torch.equal(uniforms(key(3, 7, 42), 5), alone)  # the order of the counters matters
    assert torch.equal(uniforms(key(7, 3, 42), 9)[:5], alone)  # asking for more changes nothing


def test_uniforms_and_noise_have_the_moments_of_their_distributions():
    for draws, mean, std in (
        (uniforms(key(0, torch.arange(2000)), 500), 0.5, 12**-0.5),
        (noise(key(0, torch.arange(2000)), 501), 0, 3**-0.5),
    ):
        assert abs(draws.mean() - mean) < 0.002 and abs(draws.std() - std) < 0.002
        assert (
            draws.min() >= mean - std * 3**0.5 - 1e-6 and draws.max() < mean + std * 3**0.5 + 1e-6
        )
        correlation = torch.corrcoef(draws[:, :40].T) - torch.eye(40)  # between columns
        assert correlation.abs().max() < 0.1
        neighbours = torch.corrcoef(draws[:40]) - torch.eye(40)  # between samples
        assert neighbours.abs().max() < 0.25


def test_keys_do_not_collide():
    keys = key(torch.arange(10)[:, None, None], torch.arange(30)[:, None], torch.arange(1000))
    assert keys.unique().numel() == keys.numel()


def test_splitmix64_itself():
    """The published sequence of splitmix64 for seed 1234567: our mixing is the reference's, bit for bit."""
    from draws import _GOLDEN, _mix

    state = torch.tensor(1234567) + _GOLDEN * torch.arange(1, 6)
    expected = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert [int(h) % 2**64 for h in _mix(state)] == expected
