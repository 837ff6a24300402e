"""Random numbers of each image of a batch: uniform, normal, independent, by the kernel and by plain code."""

import pytest
import torch

from serpent_ir.degradations import ImageGenerators, randomness
from serpent_ir.degradations.randomness import image_keys, rand, rand_each


def test_images_have_random_numbers_of_their_own():
    """Uniform, normal, uncorrelated between neighbours, channels, images and calls."""
    keys = image_keys(7, torch.arange(4))
    places = torch.zeros(4, 2, dtype=torch.long)
    generator = ImageGenerators(keys, places, places + 300)
    drawn = torch.stack([generator.randn(3, 300, 300) for _ in range(2)]).double()
    error = drawn.numel() ** -0.5
    assert abs(drawn.mean()) < 5 * error
    assert abs(drawn.var() - 1) < 5 * 2**0.5 * error
    assert abs(drawn.pow(4).mean() - 3) < 5 * 96**0.5 * error
    for axis in range(5):
        assert abs((drawn * drawn.roll(1, axis)).mean()) < 5 * error
        assert abs((drawn.square() * drawn.square().roll(1, axis)).mean() - 1) < 5 * 8**0.5 * error
    uniform = generator.rand(200_000).double()
    assert 0 <= uniform.min() < uniform.max() < 1
    assert abs(uniform.mean() - 0.5) < 5 * (1 / 12 / uniform.numel()) ** 0.5
    counts = torch.bincount(torch.stack([generator.below(71) for _ in range(5000)]).flatten(), minlength=71)
    assert len(counts) == 71
    assert (counts - 20_000 / 71).abs().max() < 5 * (20_000 / 71) ** 0.5
    # A window of an image has the noise that it has in the whole.
    window = ImageGenerators(keys, places + torch.tensor([40, 100]), places + 300)
    again = ImageGenerators(keys, places, places + 300)
    assert torch.equal(window.randn(4, 50, 60), again.randn(4, 300, 300)[:, :, 40:90, 100:160])


def test_numbers_drawn_at_once_are_those_of_one_call_after_another():
    keys, places = image_keys(3, torch.arange(5)), torch.zeros(5, 2, dtype=torch.long)
    for make in (lambda: ImageGenerators(keys, places, places), lambda: torch.Generator().manual_seed(3)):
        one, other = make(), make()
        for count in (3, 1, 6):
            expected = [rand(one, 5, 1)[:, 0] for _ in range(count)]
            assert torch.equal(torch.stack(rand_each(other, 5, count)), torch.stack(expected))


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_the_kernel_of_noise_counts_as_the_plain_code(channels, monkeypatch):
    """In Triton's interpreter where there is no GPU; sums of single-precision functions may differ in last bits."""
    pytest.importorskip("triton")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    table = torch.stack(
        [image_keys(5, torch.arange(3)), *torch.tensor([[3, 0, 9], [1, 70, 2]]), *[torch.arange(99, 102)] * 2]
    )
    table = table.T.contiguous().to(device)  # columns, as in a batch
    drawn = []
    for kernels in (set(), {device.type}):
        monkeypatch.setattr(randomness, "KERNELS", kernels)
        generator = ImageGenerators(table[:, 0], table[:, 1:3], table[:, 3:5])
        generator.below(7)
        drawn.append([generator.randn(channels, *size) for size in ((5, 7), (40, 33))])
    for plain, kernel in zip(*drawn, strict=True):
        assert kernel.shape == plain.shape
        torch.testing.assert_close(kernel, plain, rtol=0, atol=4e-6)
