"""Log sinks for W&B and MLflow."""

from __future__ import annotations

import html
import importlib
from functools import partial
from typing import Any, ClassVar

import numpy as np

from lightning_gradguard.charts import decode_png
from lightning_gradguard.loggers.base import FailSafe, LoggerSink, LogRecord, Picture, PictureQueue
from lightning_gradguard.stats.histogram import EDGES


class MediaSink(LoggerSink):
    """Base of sinks that show pictures and texts.

    Pictures are drawn on a thread, rarely (see `PictureQueue`). An error of the media does not stop the scalars.

    Args:
        logger: As for `LoggerSink`.
    """

    def __init__(self, logger: Any) -> None:
        super().__init__(logger)
        self._media, self._pictures = FailSafe(f"{self.name} media"), PictureQueue(self.name)

    def write(self, step: int, record: LogRecord) -> None:
        """Log a record, and pictures that have been drawn."""
        super().write(step, record)
        if self._media.is_off:
            return
        self._media.run(lambda: self.log_media(step, record))
        self._pictures.start(step, record)
        self._log_pictures(wait=False)

    def close(self) -> None:
        """Draw and log the pictures that wait."""
        self._log_pictures(wait=True)
        self._pictures.close()

    def log_media(self, step: int, record: LogRecord) -> None:
        """Log histograms and texts."""
        raise NotImplementedError

    def log_picture(self, picture: Picture) -> None:
        """Log a finished picture."""
        raise NotImplementedError

    def _log_pictures(self, wait: bool) -> None:
        for picture in self._pictures.take(wait=wait):
            self._media.run(partial(self.log_picture, picture))


class WandbSink(MediaSink):
    """Sink that shows records in W&B.

    Histograms have the axis that they were counted on.

    Args:
        logger: A ``WandbLogger``.
    """

    def lacks_some_of(self, record: LogRecord) -> bool:
        """Return False: W&B shows everything."""
        return False

    def log_media(self, step: int, record: LogRecord) -> None:
        """Log histograms, and texts as preformatted Markdown."""
        wandb = importlib.import_module("wandb")
        media = {
            tag: wandb.Histogram(np_histogram=(np.array(counts), np.array(record.edges.get(tag, EDGES))))
            for tag, counts in record.histograms.items()
        }
        for tag, text in record.texts.items():
            media[tag] = wandb.Html(f'<pre style="white-space: pre-wrap">{html.escape(text)}</pre>')
        if media:
            self.logger.log_metrics(media, step=step)

    def log_picture(self, picture: Picture) -> None:
        """Log a picture with its note below."""
        pixels = decode_png(picture.png)
        self.logger.log_image(picture.tag, [pixels], step=picture.step, caption=[picture.note])


class MlflowSink(MediaSink):
    """Sink that shows records in MLflow.

    MLflow has no histograms. A text is an artifact, ``TAG.md``, of the newest step.

    Args:
        logger: An ``MLFlowLogger``.
    """

    shows: ClassVar[str] = "scalars, heat map and texts"
    lacks: ClassVar[str] = "histograms"

    def lacks_some_of(self, record: LogRecord) -> bool:
        """Return True if the record holds histograms."""
        return bool(record.histograms)

    def log_media(self, step: int, record: LogRecord) -> None:
        """Log texts."""
        for tag, text in record.texts.items():
            self.logger.experiment.log_text(self.logger.run_id, text, f"{tag}.md")

    def log_picture(self, picture: Picture) -> None:
        """Log a picture at its step."""
        pixels = decode_png(picture.png)
        self.logger.experiment.log_image(self.logger.run_id, pixels, key=picture.tag, step=picture.step)
