"""Lightning's hooks translated for `Guard` and the sinks; the only room that imports Lightning."""

from lightning_gradguard.callbacks.grad_guard import GradGuard as GradGuard
from lightning_gradguard.callbacks.grad_histogram import GradHistogram as GradHistogram
