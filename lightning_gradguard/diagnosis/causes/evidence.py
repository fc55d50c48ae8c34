"""A clue speaks for one cause, with a weight and a sentence of numbers."""

from __future__ import annotations

from typing import NamedTuple

from lightning_gradguard.diagnosis.diagnosis import Cause
from lightning_gradguard.results import Fault

#: Weight of evidence that settles the matter by itself: more than any measurable number of decades.
CERTAIN = 100.0
#: Faults of gradients that are too small, and of those too large.
FADING = (Fault.VANISHING, Fault.STALLED, Fault.UNDERFLOW, Fault.DEAD, Fault.DISCONNECTED)
GROWING = (Fault.EXPLODING, Fault.NONFINITE, Fault.OVERSIZED_UPDATE, Fault.SPIKE)


class Evidence(NamedTuple):
    """What speaks for a cause.

    Attributes:
        weight: Decades of the trouble for which the cause accounts: of gradient lost or gained on the way
            from the loss to the first layer, of update or loss above or below the usual. So twelve sigmoids,
            each of which passes at most a quarter, weigh 12 log10(4) = 7.2, and twelve layers with 0.41 of
            the gain that He initialisation gives weigh 12 · 0.39 = 4.7. `CERTAIN` for proof.
        cause: What it speaks for.
        evidence: A sentence with the numbers.
    """

    weight: float
    cause: Cause
    evidence: str
