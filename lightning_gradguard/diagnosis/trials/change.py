"""What a remedy changes, as data: one value for each thing that can be changed, so that two remedies add up."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass


@dataclass(frozen=True)
class Change:
    """A change of a training; the default changes nothing.

    Attributes:
        activation: Name in `torch.nn.functional` of what takes the place of each layer's activation.
        slope: Of a leaky ReLU's negative side.
        normalise: Normalise each layer's output; in a residual block the input.
        skip: Add each layer's input to what its activation gives, where the shapes are the same.
        shorten: Leave out every other layer whose output has the shape of its input.
        initialise: "he", "xavier", or "orthogonal" for recurrent weights; draws all layers' weights again.
        gates: "GRU" or "LSTM" in place of each plain recurrent layer.
        input: Standardise the inputs, batch by batch.
        target: Standardise the targets, by the mean and the spread of the batch of the trial.
        lipschitz: Divide each layer by its weights' spectral norm (arXiv:1802.05957), so that no slope exceeds 1.
        rate: Factor of the learning rate.
        momentum: In place of the optimizer's own.
        decay: Factor of the weight decay.
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
        """What it changes."""
        plain = Change()
        return frozenset(
            f.name
            for f in dataclasses.fields(self)
            if f.name != "slope" and getattr(self, f.name) != getattr(plain, f.name)
        )

    @property
    def swaps(self) -> bool:
        """Whether the forward pass is changed."""
        return bool(self.fields & {"activation", "normalise", "skip", "shorten", "lipschitz"})

    def __or__(self, other: Change) -> Change:
        """Both changes.

        Raises:
            ValueError: If they change the same thing.
        """
        both = self.fields & other.fields
        if both:
            raise ValueError(f"two changes must not change the same: both change {', '.join(sorted(both))}")
        return dataclasses.replace(self, **{name: getattr(other, name) for name in other.fields})
