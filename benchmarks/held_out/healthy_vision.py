"""Healthy nets on pictures."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.held_out.data import digit_pictures
from benchmarks.held_out.nets import VisionTransformer, two_convolutions
from benchmarks.held_out.training import Trial, measured_accuracy
from benchmarks.zoo.case import Case
from benchmarks.zoo.recipes import adam, adamw, sgd
from benchmarks.zoo.tasks import Task


def _over_fifty(step: int) -> float:
    return min(1.0, step / 50 + 0.02)


def _transformer(seed: int, *, pre_norm: bool) -> Trial:
    schedule = None if pre_norm else _over_fifty
    net = VisionTransformer(pre_norm=pre_norm)
    return Trial(net, digit_pictures(), adamw(3e-3), seed, schedule=schedule)


class ResNet(nn.Module):
    """Four blocks of two convolutions with batch normalisation, whose last scale starts at zero."""

    def __init__(self, width: int = 10, blocks: int = 4) -> None:
        super().__init__()

        def convs() -> nn.ModuleList:
            return nn.ModuleList(nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(blocks))

        self.stem, self.stem_norm = nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.first, self.second = convs(), convs()
        self.first_norms = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(blocks))
        self.second_norms = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(blocks))
        self.out = nn.Linear(4 * width, 10)
        for norm in self.second_norms:
            nn.init.zeros_(norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem_norm(self.stem(x)))
        blocks = zip(self.first, self.first_norms, self.second, self.second_norms, strict=True)
        for first, first_norm, second, second_norm in blocks:
            x = torch.relu(x + second_norm(second(torch.relu(first_norm(first(x))))))
        return self.out(F.adaptive_avg_pool2d(x, 2).flatten(1))


def _resnet(seed: int) -> Trial:
    optimizer = sgd(0.05, momentum=0.9, nesterov=True, weight_decay=1e-4)
    return Trial(ResNet(), digit_pictures(), optimizer, seed, batch_size=32)


def _double(inputs: int, outputs: int) -> nn.Sequential:
    """Return two 3 x 3 convolutions that keep the size."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(outputs, outputs, 3, padding=1),
        nn.ReLU(),
    )


class UNet(nn.Module):
    """Net that goes down twice and up again, with skips at each size."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.down1, self.down2 = _double(1, width), _double(width, 2 * width)
        self.middle = _double(2 * width, 2 * width)
        self.up1, self.up2 = _double(4 * width, width), _double(2 * width, width)
        self.out = nn.Conv2d(width, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        whole = self.down1(x)
        half = self.down2(F.max_pool2d(whole, 2))
        quarter = self.middle(F.max_pool2d(half, 2))
        up = self.up1(torch.cat([F.interpolate(quarter, scale_factor=2), half], 1))
        return self.out(self.up2(torch.cat([F.interpolate(up, scale_factor=2), whole], 1)))


def _segmentation(seed: int) -> Trial:
    pictures = digit_pictures()

    def draw(generator: torch.Generator, size: int) -> tuple[Tensor, Tensor]:
        x, _ = pictures.draw(generator, size)
        return x + torch.randn(x.shape, generator=generator), (x > 0).float()

    def objective(net: nn.Module, batch: tuple[Tensor, ...], number: int) -> Tensor:
        return F.binary_cross_entropy_with_logits(net(batch[0]), batch[1])

    return Trial(UNet(), Task(draw), adam(3e-3), seed, objective=objective, batch_size=16, examined=128)


def _separable(seed: int) -> Trial:
    def block() -> tuple[nn.Module, ...]:
        depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False)
        first_norm, first = nn.BatchNorm2d(16), nn.ReLU6()
        return depthwise, first_norm, first, nn.Conv2d(16, 16, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU6()

    net = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU6(),
        *(module for _ in range(3) for module in block()),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(64, 10),
    )
    return Trial(net, digit_pictures(), adam(1e-2), seed, batch_size=32)


def _large_rate(seed: int) -> Trial:
    net = nn.Sequential(
        nn.Conv2d(1, 12, 3, bias=False),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.Conv2d(12, 16, 3, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(64, 10),
    )

    def cosine(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 300)

    optimizer = sgd(0.3, momentum=0.9, weight_decay=5e-4)
    return Trial(net, digit_pictures(), optimizer, seed, scheduler=cosine)


def _mixup(seed: int) -> Trial:
    def mixed(net: nn.Module, batch: tuple[Tensor, ...], number: int) -> Tensor:
        x, y = batch
        other = torch.randperm(len(x))
        share = float(torch.distributions.Beta(0.4, 0.4).sample())
        output = net(share * x + (1 - share) * x[other])
        return share * F.cross_entropy(output, y) + (1 - share) * F.cross_entropy(output, y[other])

    return Trial(
        two_convolutions(),
        digit_pictures(),
        sgd(0.05, momentum=0.9),
        seed,
        objective=mixed,
        measure=measured_accuracy,
    )


CASES = [
    Case("HB01", "vision transformer", partial(_transformer, pre_norm=True), 0.8),
    Case(
        "HB02",
        "vision transformer with norms behind its layers, warm-up",
        partial(_transformer, pre_norm=False),
        0.7,
    ),
    Case("HB03", "residual net whose blocks start at nothing, Nesterov", _resnet, 0.8),
    Case("HB05", "a U-Net segments noisy pictures", _segmentation, 0.4),
    Case("HB06", "depthwise separable convolutions", _separable, 0.7),
    Case("HA06", "batch-normalised convolutions, SGD at 0.3 with momentum, cosine", _large_rate, 0.8),
    Case("HD03", "mixed examples and labels", _mixup, 0.8),
]
