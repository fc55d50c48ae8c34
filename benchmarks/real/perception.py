"""Pictures and speech: transformers, and pytorch-metric-learning."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.real.case import Falls, Model, Reaches, Run
from benchmarks.real.plain import Numbered, Plain, adam, adamw, seeded, train

SIDE, KINDS = 32, 4


def shapes(generator: torch.Generator, rows: int) -> tuple[Tensor, Tensor]:
    """Return coloured pictures of a bar, a cross, a ring or a disc, float32 [rows, 3, 32, 32], and their kinds."""
    kind = torch.randint(KINDS, (rows,), generator=generator)
    centre = torch.randint(10, SIDE - 10, (rows, 2), generator=generator)[..., None, None].float()
    line = torch.arange(SIDE).float()
    dy, dx = line[:, None] - centre[:, 0], line[None] - centre[:, 1]
    far = (dy**2 + dx**2).sqrt()
    bar = (dy.abs() < 2) & (dx.abs() < 8)
    cross = bar | ((dx.abs() < 2) & (dy.abs() < 8))
    drawn = torch.stack([bar, cross, (far > 4) & (far < 8), far < 7], 1)
    one = drawn[torch.arange(rows), kind].float()[:, None]
    colour = 0.5 + torch.rand(rows, 3, 1, 1, generator=generator)
    return 2 * one * colour - 0.5 + 0.2 * torch.randn(rows, 3, SIDE, SIDE, generator=generator), kind


def own_loss(net: Any, batch: Any) -> Tensor:
    """Return the loss that the model itself computes."""
    return net(pixel_values=batch[0], labels=batch[1]).loss


def classify(make: Any, optimizer: Any, steps: int, rows: int = 16, loss: Any = own_loss) -> Any:
    """Return a builder of a classification of `shapes`.

    Args:
        make: Creates the model.
        optimizer: Function from parameters to optimizer.
        steps: Optimizer steps.
        rows: Pictures in a batch.
        loss: Function of net and batch.
    """

    def build(seed: int) -> Run:
        def exam(module: Any) -> float:
            x, y = shapes(seeded(seed, 10**6), 128)
            return float((module.net(pixel_values=x).logits.argmax(1) == y).float().mean())

        return train(
            Plain(make(), loss, optimizer),
            Numbered(lambda number: shapes(seeded(seed, number), rows)),
            steps,
            exam,
        )

    return build


def vit() -> Any:
    """Return a vision transformer of four layers."""
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(
        ViTConfig(
            image_size=SIDE,
            patch_size=8,
            hidden_size=64,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=128,
            num_labels=KINDS,
        )
    )


def resnet() -> Any:
    """Return a small ResNet with batch normalization."""
    from transformers import ResNetConfig, ResNetForImageClassification

    return ResNetForImageClassification(
        ResNetConfig(
            embedding_size=16,
            hidden_sizes=[16, 32, 64],
            depths=[1, 1, 1],
            layer_type="basic",
            num_labels=KINDS,
        )
    )


def convnext() -> Any:
    """Return a ConvNeXt, whose blocks are scaled by 1e-6 at first."""
    from transformers import ConvNextConfig, ConvNextForImageClassification

    return ConvNextForImageClassification(
        ConvNextConfig(
            patch_size=2, hidden_sizes=[16, 32, 64], depths=[1, 2, 1], num_stages=3, num_labels=KINDS
        )
    )


def swin() -> Any:
    """Return a Swin transformer with windows of four patches."""
    from transformers import SwinConfig, SwinForImageClassification

    return SwinForImageClassification(
        SwinConfig(
            image_size=SIDE,
            patch_size=2,
            embed_dim=24,
            depths=[1, 1],
            num_heads=[2, 4],
            window_size=4,
            num_labels=KINDS,
        )
    )


def clip(seed: int, steps: int = 200) -> Run:
    """Return two towers, one for pictures and one for words, that learn to agree."""
    from transformers import CLIPConfig, CLIPModel

    sizes = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = sizes | {
        "vocab_size": 32,
        "max_position_embeddings": 8,
        "eos_token_id": 31,
        "bos_token_id": 0,
        "pad_token_id": 1,
    }
    net = CLIPModel(
        CLIPConfig(
            text_config=text, vision_config=sizes | {"image_size": SIDE, "patch_size": 8}, projection_dim=32
        )
    )

    def batches(number: int) -> dict[str, Tensor]:
        generator = seeded(seed, number)
        pictures, kind = shapes(generator, 16)
        words = torch.randint(8, 31, (16, 8), generator=generator)
        words[:, 0], words[:, 3], words[:, 7] = 0, 2 + kind, 31
        return {"pixel_values": pictures, "input_ids": words}

    def loss(net: Any, batch: Any) -> Tensor:
        return net(**batch, return_loss=True).loss

    return train(Plain(net, loss, adamw(1e-3)), Numbered(batches), steps)


def tones(generator: torch.Generator, rows: int) -> dict[str, Tensor]:
    """Return sounds of five tones each, and which tones of six they are."""
    letters = torch.randint(1, 7, (rows, 5), generator=generator)
    time = torch.arange(160) / 160.0
    waves = torch.sin(2 * torch.pi * (4 * letters[..., None].float() + 2) * time)
    gaps = torch.zeros(rows, 5, 40)
    sound = torch.cat([waves, gaps], 2).flatten(1)
    return {"input_values": sound + 0.05 * torch.randn(sound.shape, generator=generator), "labels": letters}


def wav2vec(seed: int, steps: int = 300, **settings: Any) -> Run:
    """Return speech recognition with a CTC loss.

    Args:
        seed: Seed of weights and data.
        steps: Optimizer steps.
        **settings: Settings of the model, such as ``layerdrop``.
    """
    from transformers import Wav2Vec2Config, Wav2Vec2ForCTC

    net = Wav2Vec2ForCTC(
        Wav2Vec2Config(
            vocab_size=7,
            hidden_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=96,
            conv_dim=(32, 32, 32),
            conv_kernel=(10, 3, 3),
            num_feat_extract_layers=3,
            num_conv_pos_embeddings=16,
            num_conv_pos_embedding_groups=4,
            feat_extract_norm="layer",
            do_stable_layer_norm=True,
            ctc_loss_reduction="mean",
            pad_token_id=0,
            **({"conv_stride": (5, 2, 2), "mask_time_prob": 0.0, "layerdrop": 0.0} | settings),
        )
    )
    return train(
        Plain(net, lambda net, batch: net(**batch).loss, adamw(2e-3, steps, 30)),
        Numbered(lambda number: tones(seeded(seed, number), 8)),
        steps,
    )


def whisper(seed: int, steps: int = 300) -> Run:
    """Return speech recognition with encoder and decoder."""
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    net = WhisperForConditionalGeneration(
        WhisperConfig(
            vocab_size=12,
            num_mel_bins=16,
            d_model=48,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=96,
            decoder_ffn_dim=96,
            max_source_positions=20,
            max_target_positions=8,
            pad_token_id=0,
            bos_token_id=10,
            eos_token_id=11,
            decoder_start_token_id=10,
            suppress_tokens=None,
            begin_suppress_tokens=None,
        )
    )

    def batches(number: int) -> dict[str, Tensor]:
        generator = seeded(seed, number)
        letters = torch.randint(1, 10, (16, 5), generator=generator)
        bands = F.one_hot(letters, 16).float().repeat_interleave(8, 1).transpose(1, 2)
        return {
            "input_features": bands + 0.3 * torch.randn(bands.shape, generator=generator),
            "labels": letters,
        }

    return train(
        Plain(net, lambda net, batch: net(**batch).loss, adamw(2e-3, steps, 20)), Numbered(batches), steps
    )


def segformer(seed: int, steps: int = 200) -> Run:
    """Return a segmentation of shapes and background."""
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    net = SegformerForSemanticSegmentation(
        SegformerConfig(
            num_encoder_blocks=2,
            depths=[1, 1],
            sr_ratios=[2, 1],
            hidden_sizes=[16, 32],
            patch_sizes=[3, 3],
            strides=[2, 2],
            num_attention_heads=[1, 2],
            mlp_ratios=[2, 2],
            decoder_hidden_size=32,
            num_labels=2,
        )
    )

    def batches(number: int) -> dict[str, Tensor]:
        pictures, _ = shapes(seeded(seed, number), 16)
        return {"pixel_values": pictures, "labels": (pictures.mean(1) > 0.0).long()}

    return train(Plain(net, lambda net, batch: net(**batch).loss, adamw(2e-3)), Numbered(batches), steps)


class Embedder(nn.Module):
    """Small convolutional net that embeds pictures, beside a loss that may have weights."""

    def __init__(self, criterion: Any) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU()),
            *(nn.Conv2d(16, 32, 3, 2, 1), nn.BatchNorm2d(32), nn.ReLU()),
            *(
                nn.Conv2d(32, 64, 3, 2, 1),
                nn.ReLU(),
                nn.AdaptiveAvgPool2d(1),
                nn.Flatten(),
                nn.Linear(64, 32),
            ),
        )
        self.criterion = criterion


def _embed(make: Any, mine: Any, optimizer: Any, steps: int = 250) -> Any:
    def build(seed: int) -> Run:

        miner = mine()

        def loss(net: Any, batch: Any) -> Tensor:
            embedded = net.body(batch[0])
            return net.criterion(embedded, batch[1], *(() if miner is None else (miner(embedded, batch[1]),)))

        def exam(module: Any) -> float:
            (x, y), (q, z) = shapes(seeded(seed, 10**6), 128), shapes(seeded(seed, 10**6 + 1), 64)
            near = torch.cdist(F.normalize(module.net.body(q)), F.normalize(module.net.body(x))).argmin(1)
            return float((y[near] == z).float().mean())

        return train(
            Plain(Embedder(make()), loss, optimizer),
            Numbered(lambda number: shapes(seeded(seed, number), 32)),
            steps,
            exam,
        )

    return build


def triplet() -> Any:
    """Return the triplet loss."""
    from pytorch_metric_learning.losses import TripletMarginLoss

    return TripletMarginLoss(margin=0.2)


def semihard() -> Any:
    """Return a miner of semihard triplets."""
    from pytorch_metric_learning.miners import TripletMarginMiner

    return TripletMarginMiner(margin=0.2, type_of_triplets="all")


def arcface() -> Any:
    """Return the additive angular margin loss, which has class centres of its own."""
    from pytorch_metric_learning.losses import ArcFaceLoss

    return ArcFaceLoss(num_classes=KINDS, embedding_size=32, margin=28.6, scale=16)


def multisimilarity() -> Any:
    """Return the multi-similarity loss."""
    from pytorch_metric_learning.losses import MultiSimilarityLoss

    return MultiSimilarityLoss()


HEALTHY = (
    Model(
        "vit",
        "Vision transformer, kinds of shapes",
        "transformers",
        "vision",
        classify(vit, adamw(1e-3), 300),
        learned=Reaches(0.8),
        order=("*patch_embeddings.projection.weight", "*net.classifier.weight"),
    ),
    Model(
        "resnet",
        "ResNet, kinds of shapes",
        "transformers",
        "vision",
        classify(resnet, adamw(2e-3), 150),
        learned=Reaches(0.85),
        order=(
            "*embedder.embedder.convolution.weight",
            "*stages.0.*convolution.weight",
            "*stages.2.*convolution.weight",
            "*net.classifier.1.weight",
        ),
    ),
    Model(
        "convnext",
        "ConvNeXt, blocks scaled by 1e-6",
        "transformers",
        "vision",
        classify(convnext, adamw(2e-3), 400),
        learned=Reaches(0.8),
        order=("*embeddings.patch_embeddings.weight", "*net.classifier.weight"),
    ),
    Model(
        "swin",
        "Swin transformer",
        "transformers",
        "vision",
        classify(swin, adamw(1e-3), 350),
        learned=Reaches(0.7),
        order=("*patch_embeddings.projection.weight", "*net.classifier.weight"),
    ),
    Model(
        "clip",
        "CLIP, pictures beside words",
        "transformers",
        "contrastive",
        clip,
        learned=Falls(0.8),
        order=("*patch_embedding.weight", "*visual_projection.weight"),
    ),
    Model(
        "wav2vec2",
        "Wav2Vec2, CTC loss, tones",
        "transformers",
        "speech",
        wav2vec,
        learned=Falls(0.5),
        order=(
            "*conv_layers.0.conv.weight",
            "*conv_layers.2.conv.weight",
            "*feature_projection.projection.weight",
            "*layers.1.*output_dense.weight",
            "*lm_head.weight",
        ),
    ),
    Model(
        "wav2vec2-drop",
        "Wav2Vec2, layers left out and spans masked by chance",
        "transformers",
        "speech",
        lambda seed: wav2vec(seed, 400, layerdrop=0.2, mask_time_prob=0.1, mask_time_length=2),
        learned=Falls(0.5),
        order=("*conv_layers.0.conv.weight", "*lm_head.weight"),
    ),
    Model(
        "segformer",
        "SegFormer, shapes from background",
        "transformers",
        "vision",
        segformer,
        learned=Falls(0.5),
        order=(
            "*stages.0.patch_embeddings.proj.weight",
            "*stages.0.blocks.0.mlp.fc2.weight",
            "*stages.1.blocks.0.attention.q_proj.weight",
            "*decode_head.classifier.weight",
        ),
    ),
    Model(
        "whisper",
        "Whisper, encoder and decoder, tones",
        "transformers",
        "speech",
        whisper,
        learned=Falls(0.5),
        order=(
            "*encoder.conv1.weight",
            "*encoder.conv2.weight",
            "*encoder.layers.0.self_attn.q_proj.weight",
            "*decoder.layers.1.fc2.weight",
        ),
    ),
    Model(
        "triplet",
        "Triplet loss with a miner",
        "pytorch-metric-learning",
        "metric learning",
        _embed(triplet, semihard, adam(1e-3)),
        learned=Reaches(0.85),
        order=("*body.0.weight", "*body.3.weight", "*body.6.weight", "*body.10.weight"),
    ),
    Model(
        "arcface",
        "ArcFace, a loss with weights",
        "pytorch-metric-learning",
        "metric learning",
        _embed(arcface, lambda: None, adam(1e-3)),
        learned=Reaches(0.85),
        order=("*body.0.weight", "*body.10.weight", "*criterion.W"),
    ),
    Model(
        "multisimilarity",
        "Multi-similarity loss",
        "pytorch-metric-learning",
        "metric learning",
        _embed(multisimilarity, lambda: None, adam(1e-3)),
        learned=Reaches(0.85),
        order=("*body.0.weight", "*body.10.weight"),
    ),
)
