"""The measures of noise know noise from structure, and the script runs end to end."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import residual_noise
from benchmarks.residual_noise import grain, high_frequency_energy

SMALL = ("backend.rollout.num_steps=3",)


def noise(std, count=4, channels=1, size=(64, 64), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return std * torch.randn(count, channels, *size, generator=generator)


def grey_noise(std):
    """Pictures [4, 3, 64, 64] with the same noise in all channels."""
    return noise(std).expand(-1, 3, -1, -1)


@pytest.mark.parametrize("std", [0.01, 0.1, 1.0])
def test_grain_of_white_noise_is_its_deviation(std):
    # 4 x 62^2 responses, a median of which scatters by about 1 % (neighbours are correlated).
    assert grain(grey_noise(std)).mean() == pytest.approx(127.5 * std, rel=0.04)
    # Independent channels average out in grey.
    independent = noise(std, channels=3)
    assert grain(independent).mean() == pytest.approx(127.5 * std / 3**0.5, rel=0.04)


def test_grain_ignores_ramps_edges_and_brightness():
    ramp = torch.linspace(-1, 1, 64).expand(4, 3, 64, 64)
    assert grain(ramp).max() < 1e-3
    strokes = torch.full((4, 3, 64, 64), 3.0)  # brighter than white: it is not clipped
    strokes[:, :, 20:40, 10:50:10] = -1.0
    assert grain(strokes).max() == 0
    alone, together = grain(grey_noise(0.05)), grain(strokes + grey_noise(0.05))
    torch.testing.assert_close(together, alone, rtol=0.15, atol=0)
    assert (together > alone).all()


def test_high_frequency_energy_is_the_variance_of_white_noise():
    assert high_frequency_energy(noise(0.3, channels=8)).mean() == pytest.approx(0.09, rel=0.03)
    smooth = torch.linspace(0, 1, 64).expand(2, 8, 64, 64)
    assert high_frequency_energy(smooth).max() < 1e-9
    board = torch.ones(1, 1, 8, 8)
    board[..., ::2, 1::2] = board[..., 1::2, ::2] = -1.0
    # A chessboard is the highest frequency there is: every response is 16.
    assert high_frequency_energy(board).item() == pytest.approx(16**2 / 36)


def test_the_mask_is_applied_to_each_channel_alone():
    images = noise(1.0, count=2, channels=3, size=(5, 6)).double()
    found = residual_noise.mask_response(images)
    assert found.shape == (2, 3, 3, 4)
    for n, c, i, j in [(0, 0, 0, 0), (1, 2, 2, 3)]:
        expected = sum(
            float(residual_noise.MASK[a, b] * images[n, c, i + a, j + b])
            for a in range(3)
            for b in range(3)
        )
        assert found[n, c, i, j].item() == pytest.approx(expected)


class Halving:
    """Encodes a picture as half of it, and decodes nothing."""

    class config:  # noqa: N801 - diffusers' name
        shift_factor, scaling_factor = 0.25, 2.0

    def __init__(self, pixels):
        self.latent_dist = self
        self._pixels = pixels

    def encode(self, pixels):
        return Halving(pixels)

    def mode(self):
        return self._pixels / 2


def test_round_trip_is_the_distance_from_the_encoding():
    latents, pixels = torch.zeros(2, 1, 4, 4), torch.ones(2, 1, 4, 4)
    pixels[1] = 9.0  # clamped to 1, as a picture would be
    found = residual_noise.round_trip(Halving(None), latents, pixels)
    torch.testing.assert_close(found, torch.full((2,), 0.5, dtype=torch.float64))


def test_the_whole_benchmark(tmp_path, capsys):
    options = ["--seeds", "0", "1", "--prompts", "2", "--shown", "1", "--out", str(tmp_path)]
    assert residual_noise.main([*options, *SMALL]) == 0
    (written,) = tmp_path.glob("*residual-noise.json")
    lines = json.loads(written.read_text())["lines"]
    assert len(lines) == 3 + 12
    added = lines[:3]
    for figure in ("energy", "round_trip"):
        means = [sum(line[figure]) for line in added]
        assert means == sorted(means)
    ode = [line for line in lines if line["kernel"] == "ode"]
    assert all(line["energy"] == [1.0, 1.0] and line["last_std"] == 0 for line in ode)
    noisy_end = {line["kernel"]: line for line in lines if line["condition"].endswith("all steps")}
    assert noisy_end["flow_sde"]["last_std"] > 0.1
    assert noisy_end["cps"]["last_std"] == 0
    # The last step's noise is in the latents, whatever the network does.
    assert min(noisy_end["flow_sde"]["energy"]) > max(noisy_end["cps"]["energy"])
    assert len(list(tmp_path.glob("*.png"))) == 3
    assert "Noise left in the samples" in capsys.readouterr().out
