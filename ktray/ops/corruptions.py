"""Common corruptions of images in five severities: noise, blur, weather and digital loss, with seeded draws.

Each image has a seed of its own, so that a corrupted image does not depend on the batch that it is read in. Up to 64 px the
severities are those of CIFAR-10-C, above those of ImageNet-C. Of the fifteen corruptions of that benchmark, `frost`, which
needs photographs of frost, and `snow` and `glass_blur`, which shuffle pixels one by one, are left out; `speckle_noise`,
`gaussian_blur` and `saturate` are from its additional ones.

Source: Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations" (2019),
section 3 and appendix; the severities are those of its published code.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from ktray import fingerprint

IDENTITY, REVISION = "corruptions", 1
SMALL = 64  # px up to which an image is corrupted as in CIFAR-10-C
SEVERITIES = 5

Draw = torch.Generator
Corruption = Callable[[Tensor, tuple[float, ...], Draw], Tensor]
"""(image (3, H, W) float32 in [0, 1], the numbers of a severity, its draws) -> the corrupted image, to be clipped to [0, 1]."""


def corrupt(images: Tensor, kind: str, severity: int, seeds: list[int]) -> Tensor:
    """Corrupted images (B, H, W, 3) uint8.

    Args:
        images: (B, H, W, 3) uint8 on the CPU; unchanged.
        kind: one of `KINDS`.
        severity: from 1 to 5.
        seeds: (B,) of the images; each kind and severity draws anew.
    """
    function, small, large = KINDS[kind]
    numbers = (small if images.shape[1] <= SMALL else large)[severity - 1]
    result = torch.empty_like(images)
    for index, seed in enumerate(seeds):
        draw = torch.Generator().manual_seed(fingerprint.seed_of(seed, kind, severity))
        found = function(images[index].permute(2, 0, 1).float() / 255, numbers, draw)
        result[index] = (found.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0)
    return result


def _gaussian_noise(image: Tensor, numbers: tuple[float, ...], draw: Draw) -> Tensor:
    return image + numbers[0] * torch.randn(image.shape, generator=draw)


def _shot_noise(image: Tensor, numbers: tuple[float, ...], draw: Draw) -> Tensor:
    return torch.poisson(image * numbers[0], generator=draw) / numbers[0]


def _impulse_noise(image: Tensor, numbers: tuple[float, ...], draw: Draw) -> Tensor:
    drawn = torch.rand(image.shape, generator=draw)
    salted = torch.where(drawn < numbers[0] / 2, 1.0, image)
    return torch.where(drawn > 1 - numbers[0] / 2, 0.0, salted)


def _speckle_noise(image: Tensor, numbers: tuple[float, ...], draw: Draw) -> Tensor:
    return image + image * numbers[0] * torch.randn(image.shape, generator=draw)


def _filtered(image: Tensor, kernel: Tensor) -> Tensor:
    """Each channel filtered with a kernel (h, w) of odd sides that sums to 1; edges are reflected where that is possible."""
    rows, columns = (side // 2 for side in kernel.shape)
    padded = _padded(_padded(image[None], (0, 0, rows, rows)), (columns, columns, 0, 0))
    return functional.conv2d(padded.transpose(0, 1), kernel[None, None]).transpose(0, 1)[0]


def _padded(images: Tensor, sides: tuple[int, int, int, int]) -> Tensor:
    fits = max(sides[:2]) < images.shape[3] and max(sides[2:]) < images.shape[2]
    return functional.pad(images, sides, mode="reflect" if fits else "replicate")


def _gaussian(sigma: float) -> Tensor:
    radius = max(1, math.ceil(4 * sigma))
    line = torch.exp(-torch.arange(-radius, radius + 1).float().square() / (2 * sigma**2))
    return line / line.sum()


def _gaussian_blur(image: Tensor, numbers: tuple[float, ...], draw: Draw) -> Tensor:
    line = _gaussian(numbers[0])
    return _filtered(_filtered(image, line[:, None]), line[None])


def _defocus_blur(image: Tensor, numbers: tuple[float, ...], draw: Draw) -> Tensor:
    radius, smoothing = numbers
    side = max(8, math.ceil(radius)) if radius <= 8 else math.ceil(radius)
    along = torch.arange(-side, side + 1).float()
    disc = (along[:, None].square() + along.square() <= radius**2).float()
    line = _gaussian(smoothing)
    line = line[
        (len(line) - 1) // 2 - min(side, (len(line) - 1) // 2) : (len(line) - 1) // 2 + min(side, (len(line) - 1) // 2) + 1
    ]
    blurred = functional.conv2d(disc[None, None], (line[:, None] * line)[None, None], padding=len(line) // 2)[0, 0]
    return _filtered(image, blurred / blurred.sum())


def _motion_blur(image: Tensor, numbers: tuple[float, ...], draw: Draw) -> Tensor:
    """Blurred along a line in a random direction of up to 45 degrees, with weights that fall off to one side."""
    length, sigma = int(numbers[0]), numbers[1]
    angle = math.radians(float(torch.rand(1, generator=draw)) * 90 - 45)
    kernel = torch.zeros(2 * length + 1, 2 * length + 1)
    for step in range(length + 1):
        row, column = round(length - step * math.sin(angle)), round(length + step * math.cos(angle))
        kernel[row, column] += math.exp(-(step**2) / (2 * sigma**2))
    return _filtered(image, kernel / kernel.sum())


def _zoom_blur(image: Tensor, numbers: tuple[float, ...], draw: Draw) -> Tensor:
    """The mean of the image and its enlargements about the centre, from 1 up to a factor in equal steps."""
    last, step = numbers
    factors = [1 + step * index for index in range(round((last - 1) / step))]
    side = image.shape[1:]
    total = image.clone()
    for factor in factors:
        crop = [max(1, math.ceil(length / factor)) for length in side]
        top, left = ((length - inner) // 2 for length, inner in zip(side, crop, strict=True))
        inner = image[None, :, top : top + crop[0], left : left + crop[1]]
        total += functional.interpolate(inner, size=tuple(side), mode="bilinear", align_corners=False)[0]
    return total / (len(factors) + 1)


def _fog(image: Tensor, numbers: tuple[float, ...], draw: Draw) -> Tensor:
    """A fractal of random values, coarse to fine, laid over the image."""
    strength, decay = numbers
    side = 1 << math.ceil(math.log2(max(image.shape[1:])))
    cloud, weight, cells = torch.zeros(side, side), 1.0, 2
    while cells <= side:
        values = torch.rand(1, 1, cells, cells, generator=draw)
        cloud += weight * functional.interpolate(values, size=(side, side), mode="bilinear", align_corners=False)[0, 0]
        weight, cells = weight / decay, cells * 2
    cloud = (cloud - cloud.min()) / (cloud.max() - cloud.min())
    most = image.max()
    return (image + strength * cloud[: image.shape[1], : image.shape[2]]) * most / (most + strength)


def _brightness(image: Tensor, numbers: tuple[float, ...], draw: Draw) -> Tensor:
    """The value of each pixel, its largest channel, raised by a number; hue and saturation stay."""
    value = image.max(0).values.clamp(min=1e-6)
    return image * ((value + numbers[0]).clamp(max=1) / value)


def _saturate(image: Tensor, numbers: tuple[float, ...], draw: Draw) -> Tensor:
    """The saturation of each pixel times a number plus another; hue and value stay."""
    value, least = image.max(0).values, image.min(0).values
    saturation = (value - least) / value.clamp(min=1e-6)
    wanted = (saturation * numbers[0] + numbers[1]).clamp(0, 1)
    factor = torch.where(saturation > 0, wanted / saturation.clamp(min=1e-6), 0.0)
    return value - (value - image) * factor


def _contrast(image: Tensor, numbers: tuple[float, ...], draw: Draw) -> Tensor:
    mean = image.mean((1, 2), keepdim=True)
    return (image - mean) * numbers[0] + mean


def _elastic(image: Tensor, numbers: tuple[float, ...], draw: Draw) -> Tensor:
    """Pixels moved by a smooth random field; the numbers are its largest shift and its smoothness, as shares of the side."""
    side = image.shape[1]
    shift, sigma = numbers[0] * side, max(numbers[1] * side, 0.5)
    field = torch.rand(2, *image.shape[1:], generator=draw) * 2 - 1
    line = _gaussian(sigma)
    field = _filtered(_filtered(field, line[:, None]), line[None])
    field = field / field.abs().max().clamp(min=1e-6) * shift
    rows, columns = (torch.arange(length).float() for length in image.shape[1:])
    x = (columns[None] + field[0]) * 2 / max(image.shape[2] - 1, 1) - 1
    y = (rows[:, None] + field[1]) * 2 / max(image.shape[1] - 1, 1) - 1
    grid = torch.stack([x, y], -1)[None]
    return functional.grid_sample(image[None], grid, mode="bilinear", padding_mode="reflection", align_corners=True)[0]


def _pixelate(image: Tensor, numbers: tuple[float, ...], draw: Draw) -> Tensor:
    smaller = [max(1, int(length * numbers[0])) for length in image.shape[1:]]
    small = functional.interpolate(image[None], size=tuple(smaller), mode="area")
    return functional.interpolate(small, size=tuple(image.shape[1:]), mode="nearest")[0]


def _jpeg(image: Tensor, numbers: tuple[float, ...], draw: Draw) -> Tensor:
    from torchvision.io import ImageReadMode, decode_jpeg, encode_jpeg

    encoded = encode_jpeg((image * 255).round().to(torch.uint8), quality=int(numbers[0]))
    decoded: Tensor = decode_jpeg(encoded, mode=ImageReadMode.RGB)
    return decoded.float() / 255


def _each(*values: float) -> tuple[tuple[float, ...], ...]:
    return tuple((value,) for value in values)


_ELASTIC = ((0.02, 0.08), (0.03, 0.07), (0.04, 0.06), (0.05, 0.05), (0.06, 0.04))

KINDS: dict[str, tuple[Corruption, tuple[tuple[float, ...], ...], tuple[tuple[float, ...], ...]]] = {
    "gaussian_noise": (_gaussian_noise, _each(0.04, 0.06, 0.08, 0.09, 0.10), _each(0.08, 0.12, 0.18, 0.26, 0.38)),
    "shot_noise": (_shot_noise, _each(500, 250, 100, 75, 50), _each(60, 25, 12, 5, 3)),
    "impulse_noise": (_impulse_noise, _each(0.01, 0.02, 0.03, 0.05, 0.07), _each(0.03, 0.06, 0.09, 0.17, 0.27)),
    "speckle_noise": (_speckle_noise, _each(0.06, 0.1, 0.12, 0.16, 0.2), _each(0.15, 0.2, 0.35, 0.45, 0.6)),
    "gaussian_blur": (_gaussian_blur, _each(0.4, 0.6, 0.7, 0.8, 1.0), _each(1, 2, 3, 4, 6)),
    "defocus_blur": (
        _defocus_blur,
        ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
        ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
    ),
    "motion_blur": (
        _motion_blur,
        ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
        ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
    ),
    "zoom_blur": (
        _zoom_blur,
        ((1.06, 0.01), (1.11, 0.01), (1.16, 0.01), (1.21, 0.01), (1.26, 0.01)),
        ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)),
    ),
    "fog": (
        _fog,
        ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
        ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)),
    ),
    "brightness": (_brightness, _each(0.05, 0.1, 0.15, 0.2, 0.3), _each(0.1, 0.2, 0.3, 0.4, 0.5)),
    "contrast": (_contrast, _each(0.75, 0.5, 0.4, 0.3, 0.15), _each(0.4, 0.3, 0.2, 0.1, 0.05)),
    "saturate": (
        _saturate,
        ((0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2)),
        ((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2)),
    ),
    "elastic": (_elastic, _ELASTIC, _ELASTIC),
    "pixelate": (_pixelate, _each(0.95, 0.9, 0.85, 0.75, 0.65), _each(0.6, 0.5, 0.4, 0.3, 0.25)),
    "jpeg": (_jpeg, _each(80, 65, 58, 50, 40), _each(25, 18, 15, 10, 7)),
}
"""Name -> the corruption, and the numbers of its severities for small and for large images. Those of `elastic` are ours."""
