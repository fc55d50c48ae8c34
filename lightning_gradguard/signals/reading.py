"""Old import path of `lightning_gradguard.detectors.base`."""

from lightning_gradguard.detectors.base import Detector as Detector
from lightning_gradguard.detectors.base import NoState as Nothing
from lightning_gradguard.detectors.base import Reading as Reading
from lightning_gradguard.detectors.base import reading as reading

__all__ = ["Detector", "Nothing", "Reading", "reading"]
