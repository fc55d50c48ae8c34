"""Diffusion, variational models and flows: diffusers, vector-quantize-pytorch, zuko and nflows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.real.case import Falls, FallsBy, Model, Run
from benchmarks.real.plain import Numbered, Plain, adam, adamw, seeded, train

SIDE = 16


def pictures(generator: torch.Generator, rows: int, side: int = SIDE) -> Tensor:
    """Return grey pictures of one bright rectangle each, float32 [rows, 1, side, side] in -1 .. 1."""
    low = torch.randint(0, side // 2, (rows, 2), generator=generator)
    size = torch.randint(side // 4, side // 2, (rows, 2), generator=generator)
    line = torch.arange(side)
    inside = (line >= low[..., None]) & (line < (low + size)[..., None])
    picture = (inside[:, 0, :, None] & inside[:, 1, None, :]).float()[:, None]
    return 2 * picture - 1 + 0.05 * torch.randn(picture.shape, generator=generator)


def _denoise(net: Any, steps: int, seed: int, optimizer: Any, rows: int, **arguments: Any) -> Run:
    from diffusers import DDPMScheduler

    noises = DDPMScheduler(num_train_timesteps=200)

    def batches(number: int) -> tuple[Tensor, Tensor, Tensor]:
        generator = seeded(seed, number)
        clean = pictures(generator, rows)
        return (
            clean,
            torch.randn(clean.shape, generator=generator),
            torch.randint(200, (rows,), generator=generator),
        )

    def loss(net: Any, batch: Any) -> Tensor:
        clean, noise, time = batch
        given = {name: value(rows) for name, value in arguments.items()}
        return F.mse_loss(net(noises.add_noise(clean, noise, time), time, **given).sample, noise)

    return train(Plain(net, loss, optimizer), Numbered(batches), steps)


def unet(seed: int, steps: int = 150) -> Run:
    """Return a diffusion model with a U-Net."""
    from diffusers import UNet2DModel

    net = UNet2DModel(
        sample_size=SIDE,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(16, 32),
        norm_num_groups=8,
        attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    return _denoise(net, steps, seed, adamw(2e-3), 16)


def dit(seed: int, steps: int = 200) -> Run:
    """Return a diffusion model with a transformer whose blocks are modulated by the time."""
    from diffusers import DiTTransformer2DModel

    net = DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=16,
        in_channels=1,
        out_channels=1,
        num_layers=3,
        norm_num_groups=8,
        sample_size=SIDE,
        patch_size=4,
        num_embeds_ada_norm=200,
    )
    return _denoise(
        net, steps, seed, adamw(1e-3), 16, class_labels=lambda rows: torch.zeros(rows, dtype=torch.long)
    )


def kl(seed: int, steps: int = 200) -> Run:
    """Return a variational autoencoder of pictures."""
    from diffusers import AutoencoderKL

    net = AutoencoderKL(
        in_channels=1,
        out_channels=1,
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        block_out_channels=(16, 32),
        latent_channels=4,
        norm_num_groups=8,
        sample_size=SIDE,
    )

    def loss(net: Any, clean: Tensor) -> Tensor:
        code = net.encode(clean).latent_dist
        return F.mse_loss(net.decode(code.sample()).sample, clean) + 1e-4 * code.kl().mean()

    return train(
        Plain(net, loss, adam(1e-3)), Numbered(lambda number: pictures(seeded(seed, number), 16)), steps
    )


class Quantized(nn.Module):
    """Convolutional autoencoder around the codebook of vector-quantize-pytorch, which is not trained by gradients."""

    def __init__(self) -> None:
        super().__init__()
        from vector_quantize_pytorch import VectorQuantize

        self.encoder = nn.Sequential(
            nn.Conv2d(1, 16, 4, 2, 1), nn.GELU(), nn.Conv2d(16, 32, 4, 2, 1), nn.GELU(), nn.Conv2d(32, 16, 1)
        )
        self.codes = VectorQuantize(dim=16, codebook_size=64, accept_image_fmap=True, kmeans_init=True)
        self.decoder = nn.Sequential(
            nn.Conv2d(16, 32, 1),
            nn.GELU(),
            nn.ConvTranspose2d(32, 16, 4, 2, 1),
            nn.GELU(),
            nn.ConvTranspose2d(16, 1, 4, 2, 1),
        )

    def forward(self, clean: Tensor) -> Tensor:
        chosen, _, commitment = self.codes(self.encoder(clean))
        return F.mse_loss(self.decoder(chosen), clean) + commitment.sum()


def vq(seed: int, steps: int = 300) -> Run:
    """Return an autoencoder with quantized codes."""
    return train(
        Plain(Quantized(), lambda net, clean: net(clean), adam(2e-3)),
        Numbered(lambda number: pictures(seeded(seed, number), 32)),
        steps,
    )


def moons(generator: torch.Generator, rows: int) -> Tensor:
    """Return points on two half circles in four dimensions, two of them correlated noise."""
    angle = torch.pi * torch.rand(rows, generator=generator)
    upper = torch.rand(rows, generator=generator) < 0.5
    x = torch.where(upper, angle.cos(), 1 - angle.cos()) - 0.5
    y = torch.where(upper, angle.sin(), 0.5 - angle.sin()) - 0.25
    noise = torch.randn(rows, 4, generator=generator)
    return torch.stack([x, y, 0.3 * x + 0.5 * noise[:, 2], noise[:, 3]], 1) + 0.05 * noise


def _flow(make: Any, negative: Any, optimizer: Any, steps: int) -> Any:
    def build(seed: int) -> Run:
        return train(
            Plain(make(), negative, optimizer),
            Numbered(lambda number: moons(seeded(seed, number), 128)),
            steps,
        )

    return build


def nsf() -> Any:
    """Return a neural spline flow of zuko with three transforms."""
    from zuko.flows import NSF

    return NSF(features=4, transforms=3, hidden_features=(48, 48))


def maf() -> Any:
    """Return a masked autoregressive flow of nflows with four transforms."""
    from nflows.distributions.normal import StandardNormal
    from nflows.flows.base import Flow
    from nflows.transforms.autoregressive import MaskedAffineAutoregressiveTransform
    from nflows.transforms.base import CompositeTransform
    from nflows.transforms.permutations import ReversePermutation

    parts: list[Any] = []
    for _ in range(4):
        parts += [
            ReversePermutation(features=4),
            MaskedAffineAutoregressiveTransform(features=4, hidden_features=32),
        ]
    return Flow(CompositeTransform(parts), StandardNormal(shape=[4]))


HEALTHY = (
    Model(
        "unet",
        "U-Net, diffusion of pictures",
        "diffusers",
        "diffusion",
        unet,
        learned=Falls(0.5),
        order=(
            "*net.conv_in.weight",
            "*down_blocks.0.resnets.0.conv1.weight",
            "*mid_block.resnets.0.conv1.weight",
            "*up_blocks.1.resnets.1.conv2.weight",
            "*net.conv_out.weight",
        ),
    ),
    Model(
        "dit",
        "Diffusion transformer, zero-initialised modulation",
        "diffusers",
        "diffusion",
        dit,
        learned=Falls(0.7),
        order=(
            "*pos_embed.proj.weight",
            "*transformer_blocks.0.attn1.to_q.weight",
            "*transformer_blocks.2.attn1.to_q.weight",
            "*proj_out_2.weight",
        ),
    ),
    Model(
        "kl",
        "Variational autoencoder of pictures",
        "diffusers",
        "variational",
        kl,
        learned=Falls(0.5),
        order=(
            "*encoder.conv_in.weight",
            "*encoder.conv_out.weight",
            "*decoder.conv_in.weight",
            "*decoder.conv_out.weight",
        ),
    ),
    Model(
        "vq",
        "Autoencoder with a codebook",
        "vector-quantize-pytorch",
        "variational",
        vq,
        learned=Falls(0.5),
        order=("*encoder.0.weight", "*encoder.4.weight", "*decoder.0.weight", "*decoder.4.weight"),
    ),
    Model(
        "nsf",
        "Neural spline flow",
        "zuko",
        "flow",
        _flow(nsf, lambda net, x: -net().log_prob(x).mean(), adam(3e-3), 200),
        learned=FallsBy(0.8),
        order=(
            "*transforms.0.hyper.0.weight",
            "*transforms.0.hyper.4.weight",
            "*transforms.1.hyper.0.weight",
            "*transforms.2.hyper.4.weight",
        ),
    ),
    Model(
        "maf",
        "Masked autoregressive flow",
        "nflows",
        "flow",
        _flow(maf, lambda net, x: -net.log_prob(x).mean(), adam(3e-3), 250),
        learned=FallsBy(0.4),
        order=(
            "*transforms.1.*initial_layer.weight",
            "*transforms.1.*final_layer.weight",
            "*transforms.3.*initial_layer.weight",
            "*transforms.7.*final_layer.weight",
        ),
    ),
)
