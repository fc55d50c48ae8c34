"""Evidence for a cause: a weight, and a sentence with the numbers."""

from __future__ import annotations

from typing import NamedTuple

#: Weight of proof: more than any measurable number of decades.
CERTAIN = 100.0


class Evidence(NamedTuple):
    """Evidence for a cause.

    Attributes:
        weight: Decades of the problem for which the cause accounts: of gradient lost or gained on the way from the loss
            to the first layer, of update or loss above or below a typical one. For example, twelve sigmoids, each of
            which passes at most a quarter, weigh 12 log10(4) = 7.2, and twelve layers with 0.41 of the gain that He
            initialization gives weigh 12 · 0.39 = 4.7. `CERTAIN` for proof.
        text: A sentence with the numbers.
    """

    weight: float
    text: str
