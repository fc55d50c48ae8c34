"""Lightning callbacks, and their parts.

Besides the command line, only this folder imports Lightning.
"""

from lightning_gradguard.callbacks.grad_guard import GradGuard as GradGuard
from lightning_gradguard.callbacks.grad_histogram import GradHistogram as GradHistogram
