"""The change that a fix makes, as data: one field for each thing that can be changed, so that changes combine."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass


@dataclass(frozen=True)
class Change:
    """A change of a training; the default changes nothing.

    Attributes:
        activation: Name in `torch.nn.functional` of the function that replaces each layer's activation.
        slope: Slope of the negative side of a leaky ReLU.
        normalise: Normalize each layer's output; in a residual block its input.
        skip: Add each layer's input to the output of its activation, where the shapes are the same.
        shorten: Leave out every other layer whose output has the shape of its input.
        initialise: "he", "xavier", or "orthogonal" for recurrent weights; draws these weights again.
        gates: "GRU" or "LSTM" in place of each plain recurrent layer.
        input: Standardize the inputs, batch by batch.
        target: Standardize the targets, by the mean and standard deviation of the batch of the trial.
        lipschitz: Divide each layer by the spectral norm of its weights (arXiv:1802.05957), so that no slope exceeds 1.
        rate: Factor of the learning rate.
        decay: Factor of the weight decay.
        momentum: Momentum in place of the optimizer's own.
    """

    activation: str | None = None
    slope: float = 0.1
    normalise: bool = False
    skip: bool = False
    shorten: bool = False
    initialise: str | None = None
    gates: str | None = None
    input: bool = False
    target: bool = False
    lipschitz: bool = False
    rate: float = 1.0
    decay: float = 1.0
    momentum: float | None = None

    @property
    def fields(self) -> frozenset[str]:
        """Names of the fields that differ from the default."""
        plain = Change()
        return frozenset(
            f.name
            for f in dataclasses.fields(self)
            if f.name != "slope" and getattr(self, f.name) != getattr(plain, f.name)
        )

    @property
    def changes_forward(self) -> bool:
        """True if functions of the forward pass are replaced."""
        return bool(self.fields & {"activation", "normalise", "skip", "shorten", "lipschitz"})

    def __or__(self, other: Change) -> Change:
        """Combine two changes.

        Raises:
            ValueError: If both change the same field.
        """
        both = self.fields & other.fields
        if both:
            raise ValueError(
                f"changes can be combined only if they differ: both change {', '.join(sorted(both))}"
            )
        return dataclasses.replace(self, **{name: getattr(other, name) for name in other.fields})
