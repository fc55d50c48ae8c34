"""The same trainings, broken as it happens in practice."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.real import forecasting, graphs, language, perception, tabular
from benchmarks.real.case import EndsBelow, Falls, Model, Reaches, Run
from benchmarks.real.plain import adamw
from lightning_gradguard import Cause, Fault


def _softmax_first(net: Any, batch: Any) -> Tensor:
    chances = net(input_ids=batch["input_ids"]).logits.softmax(-1)
    return F.cross_entropy(chances[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())


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


def _missing_feature(data: list[Any]) -> None:
    """Put a NaN into one node of one graph."""
    data[17].x[3, 1] = float("nan")


def stale(seed: int) -> Run:
    """Return the ResNet whose layers are replaced after its optimizer was made."""
    net = perception.resnet()
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3)
    fresh = perception.resnet()
    build = perception.classify(lambda: fresh, lambda _: optimizer, 150)
    return build(seed)


def long_labels(seed: int) -> Run:
    """Return speech recognition in which labels are longer than the sound has frames."""
    return perception.wav2vec(seed, 300, conv_stride=(10, 8, 4))


BROKEN = (
    Model(
        "gpt2-rate",
        "GPT-2",
        "transformers",
        "language",
        language.causal(language.gpt2, 400, adamw(3.0)),
        learned=Falls(0.5),
        faults=(Fault.OVERSIZED_UPDATE, Fault.EXPLODING),
        causes=(Cause.LEARNING_RATE_TOO_HIGH,),
        broken="learning rate times 1,000",
    ),
    Model(
        "gpt2-half",
        "GPT-2",
        "transformers",
        "language",
        language.causal(language.gpt2, 400, adamw(3e-3), precision="16-true"),
        learned=Falls(0.5),
        faults=(Fault.NONFINITE, Fault.UNDERFLOW),
        causes=(Cause.LOW_PRECISION, Cause.OPTIMIZER_EPSILON),
        broken="weights and optimizer in float16",
    ),
    Model(
        "gin-nan",
        "GIN, batches that are objects",
        "torch-geometric",
        "graph",
        lambda seed: graphs.gin(seed, spoil=_missing_feature),
        learned=Falls(0.6),
        faults=(Fault.NONFINITE,),
        causes=(Cause.BAD_DATA,),
        broken="one NaN among the features of one graph",
    ),
    Model(
        "tagger-cut",
        "BERT under a linear head",
        "transformers",
        "encoder",
        lambda seed: language.tagger(seed, make=CutTagger),
        learned=Falls(0.5),
        faults=(Fault.DISCONNECTED,),
        causes=(Cause.DETACHED_GRAPH,),
        said=("no path",),
        broken="encoder under no_grad",
    ),
    Model(
        "resnet-stale",
        "ResNet",
        "transformers",
        "vision",
        stale,
        learned=Reaches(0.85),
        causes=(Cause.STALE_OPTIMIZER,),
        said=("stale optimizer",),
        broken="net replaced after its optimizer was made",
    ),
    Model(
        "gpt2-softmax",
        "GPT-2",
        "transformers",
        "language",
        language.causal(language.gpt2, 400, adamw(3e-3), loss=_softmax_first),
        learned=Falls(0.5),
        causes=(Cause.LOSS_FUNCTION,),
        said=("softmax",),
        broken="softmax before the cross-entropy",
    ),
    Model(
        "tabular-norms",
        "Residual net for tables",
        "rtdl-revisiting-models",
        "tabular",
        lambda seed: tabular.resnet(seed, change=_without_norms),
        learned=EndsBelow(0.3),
        faults=(Fault.EXPLODING, Fault.VANISHING, Fault.OVERSIZED_UPDATE),
        causes=(Cause.BAD_INITIALIZATION,),
        said=("bad initialization",),
        broken="no normalization, weights times 10",
    ),
    Model(
        "tft-scale",
        "Temporal fusion transformer",
        "pytorch-forecasting",
        "forecasting",
        forecasting.temporal_fusion(True, scale=1e4),
        learned=Falls(0.5),
        faults=(Fault.STALLED, Fault.EXPLODING, Fault.VANISHING, Fault.OVERSIZED_UPDATE),
        causes=(Cause.TARGET_SCALE,),
        said=("target scale",),
        broken="targets times 10,000, not normalized",
    ),
    Model(
        "ft-raw",
        "Feature tokenizer and transformer",
        "rtdl-revisiting-models",
        "tabular",
        lambda seed: tabular.ft_transformer(seed, scale=1e5),
        learned=EndsBelow(0.3),
        faults=(Fault.EXPLODING, Fault.VANISHING, Fault.OVERSIZED_UPDATE, Fault.STALLED),
        causes=(Cause.UNNORMALIZED_INPUT,),
        said=("unnormalized input",),
        broken="three columns times 100,000",
    ),
    Model(
        "wav2vec2-short",
        "Wav2Vec2, CTC loss",
        "transformers",
        "speech",
        long_labels,
        learned=Falls(0.5),
        faults=(Fault.NONFINITE,),
        causes=(Cause.LOSS_FUNCTION, Cause.BAD_DATA),
        said=("ctc",),
        broken="strides that leave fewer frames than labels",
    ),
)
