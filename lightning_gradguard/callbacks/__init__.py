"""Lightning's hooks translated for `Guard` and the sinks; the only room that imports Lightning."""

from lightning_gradguard.callbacks.guard import GradGuard as GradGuard
from lightning_gradguard.callbacks.histogram import GradHistogram as GradHistogram
