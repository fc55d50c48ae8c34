"""Misspelt names raise or warn once.

The message holds the nearest name that exists.
"""

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from lightning_gradguard import (
    AGC,
    AdaGC,
    AutoClip,
    GradGuard,
    GradHistogram,
    GradientWarning,
    NormClip,
    Policy,
    SpikeClip,
    SteadyClip,
    ZClip,
)

CLIPPERS = {
    kind.__name__: kind for kind in (AGC, AdaGC, AutoClip, SpikeClip, SteadyClip, ZClip)
} | {"NormClip": lambda **kw: NormClip(1.0, **kw)}  # fmt: skip


class Pair(pl.LightningModule):
    """Two nets with an optimizer each.

    The first layer has none.
    """

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.frozen = nn.Linear(8, 8)
        self.frozen.requires_grad_(False)
        self.one, self.other = nn.Linear(8, 2), nn.Linear(8, 2)

    def training_step(self, batch, batch_idx):
        for optimizer, net in zip(self.optimizers(), (self.one, self.other), strict=True):
            loss = 100 * nn.functional.cross_entropy(net(self.frozen(batch[0])), batch[1])
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(net.parameters(), lr=0.0) for net in (self.one, self.other)]


class Validated(pl.LightningModule):
    """Net that logs a metric at each validation."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 2)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.layer(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_accuracy", 0.5)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def val_dataloader(self):
        return torch.utils.data.DataLoader(torch.zeros(2, 8))


def ours(caught):
    return [str(w.message) for w in caught if issubclass(w.category, GradientWarning)]


@pytest.mark.parametrize("clipper", CLIPPERS)
def test_a_pattern_of_a_clipper_must_match(fit, classifier, clipper):
    guard = GradGuard(clipper=CLIPPERS[clipper](exclude=("net.0.wieght",)))
    with pytest.raises(ValueError, match=r"got 'net\.0\.wieght'; nearest names: net\.0\.weight"):
        fit(classifier(), guard, batches=2)


def test_a_clippers_pattern_may_match_parameters_of_another_optimizer_or_of_none(fit):
    guard = GradGuard(clipper=NormClip(1e-3, exclude=("other.*", "one.bias", "frozen.weight")))
    module = Pair()
    fit(module, guard, batches=3)
    one, other = guard._registry.guards[0], guard._registry.guards[1]
    assert (one.counts["clipped"], other.counts["clipped"]) == (3, 0)
    assert float(module.one.weight.grad.norm()) < 2e-3
    assert float(module.one.bias.grad.norm()) > 1e-2
    assert float(module.other.weight.grad.norm()) > 1e-2


def test_with_several_optimizers_the_nearest_name_is_that_of_the_whole_model(fit):
    with pytest.raises(ValueError, match=r"got 'othr\.bias'; nearest names: other\.bias"):
        fit(Pair(), GradGuard(clipper=NormClip(1.0, exclude=("othr.bias",))), batches=2)


@pytest.mark.filterwarnings("ignore:GradHistogram. nothing is written")
@pytest.mark.parametrize("argument", ["include", "exclude"])
def test_a_pattern_of_a_histogram_warns(fit, classifier, argument):
    with pytest.warns(GradientWarning) as caught:
        fit(classifier(), GradHistogram(every_n_steps=1, **{argument: ["net.0.wieght"]}), batches=4)
    said = [text for text in ours(caught) if "wieght" in text]
    assert len(said) == 1
    assert "pattern 'net.0.wieght' matches no parameter. The nearest name is 'net.0.weight'." in said[0]


def test_a_monitor_that_is_not_logged_warns_once(fit):
    with pytest.warns(GradientWarning) as caught:
        fit(Validated(), GradGuard(monitor="val_acc"), batches=4, max_epochs=3)
    assert ours(caught) == [
        "GradGuard: monitor 'val_acc' is not logged, so a diagnosis cannot cite it. The nearest metric that is logged "
        "is 'val_accuracy'."
    ]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"respond": {"vanshing": "halt"}}, "did you mean 'vanishing'?"),
        ({"respond": {"NaN": "halt"}}, "must be one of 'nonfinite', "),
        ({"respond": {"vanishing": "hlat"}}, "did you mean 'halt'?"),
        ({"respond": {"vanishing": "rolback"}}, "did you mean 'rollback'?"),
        ({"stop": "gracefull"}, "did you mean 'graceful'?"),
    ],
)
def test_a_policy_names_the_nearest_choice(arguments, said):
    with pytest.raises(ValueError, match=r"must be one of") as error:
        Policy(**arguments)
    assert said in str(error.value)
