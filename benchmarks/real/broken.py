"""The same trainings, broken as it happens in practice."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.real import forecasting, language, perception, tabular
from benchmarks.real.case import Falls, Model, Reaches, Run
from benchmarks.real.cells import SMALL, of_scvi
from benchmarks.real.plain import adamw
from lightning_gradguard import Cause, Fault


def _softmax_first(net: Any, batch: Any) -> Tensor:
    return F.cross_entropy(net(pixel_values=batch[0]).logits.softmax(1), batch[1])


class CutTagger(language.Tagger):
    """The tagger, with the gradient of its body switched off."""

    def forward(self, tokens: Tensor) -> Tensor:
        with torch.no_grad():
            states = self.body(input_ids=tokens).last_hidden_state
        return self.head(states)


def _without_norms(net: Any) -> None:
    """Remove every normalization, and make the weights ten times as large."""
    for module in list(net.modules()):
        for name, child in module.named_children():
            if isinstance(child, (nn.BatchNorm1d, nn.LayerNorm)):
                setattr(module, name, nn.Identity())
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.ndim > 1:
                parameter.mul_(10)


def _missing_gene(cells: Any) -> None:
    """Put a NaN into the counts of one cell."""
    cells.X[17, 3] = float("nan")


def stale(seed: int) -> Run:
    """Return the ResNet whose layers are replaced after its optimizer was made."""
    net = perception.resnet()
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3)
    fresh = perception.resnet()
    build = perception.classify(lambda: fresh, lambda _: optimizer, 150)
    return build(seed)


def long_labels(seed: int) -> Run:
    """Return speech recognition in which some labels are longer than the sound has frames."""
    return perception.wav2vec(seed, 300, conv_stride=(10, 8, 4))


BROKEN = (
    Model(
        "gpt2-rate", "GPT-2", "transformers", "language",
        language.causal(language.gpt2, 400, adamw(3.0)), Falls(0.5), (), 400,
        (Fault.OVERSIZED_UPDATE, Fault.EXPLODING), (Cause.LEARNING_RATE_TOO_HIGH,), (),
        "learning rate times 1,000",
    ),
    Model(
        "gpt2-half", "GPT-2", "transformers", "language",
        language.causal(language.gpt2, 400, adamw(3e-3), precision="16-true"), Falls(0.5), (), 400,
        (Fault.NONFINITE, Fault.UNDERFLOW), (Cause.LOW_PRECISION, Cause.OPTIMIZER_EPSILON), (),
        "weights and optimizer in float16",
    ),
    Model(
        "scvi-nan", "scVI", "scvi-tools", "single cell",
        of_scvi("SCVI", layers=SMALL, spoil=_missing_gene), Falls(0.9), (), 160,
        (Fault.NONFINITE,), (Cause.BAD_DATA,), (),
        "one NaN among the counts",
    ),
    Model(
        "tagger-cut", "BERT under a linear head", "transformers", "encoder",
        lambda seed: language.tagger(seed, make=CutTagger), Falls(0.5), (), 300,
        (Fault.DISCONNECTED,), (Cause.DETACHED_GRAPH,), ("no path",),
        "encoder under no_grad",
    ),
    Model(
        "resnet-stale", "ResNet", "transformers", "vision",
        stale, Reaches(0.85), (), 150,
        (), (Cause.STALE_OPTIMIZER,), ("optimizer",),
        "net replaced after its optimizer was made",
    ),
    Model(
        "vit-softmax", "Vision transformer", "transformers", "vision",
        perception.classify(perception.vit, adamw(1e-3), 300, loss=_softmax_first), Reaches(0.8), (), 300,
        (), (Cause.LOSS_FUNCTION,), ("softmax",),
        "softmax before the cross-entropy",
    ),
    Model(
        "tabular-norms", "Residual net for tables", "rtdl-revisiting-models", "tabular",
        lambda seed: tabular.resnet(seed, change=_without_norms), Falls(0.4), (), 300,
        (Fault.EXPLODING, Fault.VANISHING, Fault.OVERSIZED_UPDATE), (Cause.BAD_INITIALIZATION,), ("bad initialization",),
        "no normalization, weights times 10",
    ),
    Model(
        "tft-scale", "Temporal fusion transformer", "pytorch-forecasting", "forecasting",
        forecasting.temporal_fusion(True, scale=1e4), Falls(0.5), (), 200,
        (Fault.STALLED, Fault.EXPLODING, Fault.VANISHING, Fault.OVERSIZED_UPDATE), (Cause.TARGET_SCALE,), ("target",),
        "targets times 10,000, not normalized",
    ),
    Model(
        "ft-raw", "Feature tokenizer and transformer", "rtdl-revisiting-models", "tabular",
        lambda seed: tabular.ft_transformer(seed, scale=1e5), Falls(0.4), (), 300,
        (Fault.EXPLODING, Fault.VANISHING, Fault.OVERSIZED_UPDATE, Fault.STALLED), (Cause.UNNORMALIZED_INPUT,), ("input",),
        "three columns times 100,000",
    ),
    Model(
        "wav2vec2-short", "Wav2Vec2, CTC loss", "transformers", "speech",
        long_labels, Falls(0.5), (), 300,
        (Fault.NONFINITE,), (Cause.LOSS_FUNCTION, Cause.BAD_DATA), ("ctc",),
        "strides that leave fewer frames than labels",
    ),
    Model(
        "mae-init", "Masked autoencoder of pictures", "transformers", "vision",
        lambda seed: perception.mae(seed, spread=0.002), Falls(0.7), (), 400,
        (Fault.VANISHING, Fault.STALLED), (Cause.BAD_INITIALIZATION,), ("bad initialization",),
        "initial weights a fiftieth of what fits",
    ),
)  # fmt: skip
