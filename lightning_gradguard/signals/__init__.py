"""Old import paths of what own detectors and clippers need; they go with version 0.3."""

import warnings

warnings.warn(
    "lightning_gradguard.signals goes with version 0.3: import from lightning_gradguard.detectors, "
    "lightning_gradguard.clippers and lightning_gradguard.stats",
    FutureWarning,
    stacklevel=2,
)
