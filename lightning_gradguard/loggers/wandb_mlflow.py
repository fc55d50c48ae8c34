"""Loggers that show more than scalars: histograms, pictures and texts in W&B, pictures and texts in MLflow."""

from __future__ import annotations

import html
import importlib
from functools import partial
from typing import Any, ClassVar

import numpy as np

from lightning_gradguard.charts.heatmap import decode_png
from lightning_gradguard.loggers.base import FailSafe, LoggerSink, LogRecord
from lightning_gradguard.loggers.pictures import Picture, Pictures
from lightning_gradguard.stats.histogram import EDGES


class MediaSink(LoggerSink):
    """What both have in common: pictures are drawn on a thread, and an error of theirs does not stop the scalars.

    Args:
        logger: As for `LoggerSink`.
    """

    def __init__(self, logger: Any) -> None:
        super().__init__(logger)
        self._media_fuse, self._pictures = FailSafe(f"{self._name} media"), Pictures(self._name)

    def write(self, step: int, panel: LogRecord) -> None:
        """Logs a panel, and starts its drawings, which are logged with a later panel or on closing."""
        super().write(step, panel)
        if self._media_fuse.blown:
            return
        self._media_fuse.run(lambda: self.log_media(step, panel))
        self._pictures.start(step, panel)
        self._log_pictures(wait=False)

    def close(self) -> None:
        """Logs the pictures that are still being drawn."""
        self._log_pictures(wait=True)
        self._pictures.close()

    def log_media(self, step: int, panel: LogRecord) -> None:
        """Logs histograms and texts."""
        raise NotImplementedError

    def log_picture(self, picture: Picture) -> None:
        """Logs a picture that is done."""
        raise NotImplementedError

    def _log_pictures(self, wait: bool) -> None:
        for picture in self._pictures.done(wait=wait):
            self._media_fuse.run(partial(self.log_picture, picture))


class WandbSink(MediaSink):
    """Shows panels in W&B, histograms on the axis that they were counted on.

    Args:
        logger: A ``WandbLogger``.
    """

    def lacks_some_of(self, panel: LogRecord) -> bool:
        """Nothing."""
        return False

    def log_media(self, step: int, panel: LogRecord) -> None:
        """Logs histograms, and texts as they stand."""
        wandb = importlib.import_module("wandb")
        media = {
            tag: wandb.Histogram(np_histogram=(np.array(counts), np.array(panel.edges.get(tag, EDGES))))
            for tag, counts in panel.histograms.items()
        }
        for tag, text in panel.texts.items():
            media[tag] = wandb.Html(f'<pre style="white-space: pre-wrap">{html.escape(text)}</pre>')
        if media:
            self.logger.log_metrics(media, step=step)

    def log_picture(self, picture: Picture) -> None:
        """Logs a picture with its note below."""
        self.logger.log_image(
            picture.tag, [decode_png(picture.png)], step=picture.step, caption=[picture.note]
        )


class MlflowSink(MediaSink):
    """Shows panels in MLflow, which has no histograms; a text is an artifact, ``TAG.md``, of the newest step.

    Args:
        logger: A ``MLFlowLogger``.
    """

    shows: ClassVar[str] = "scalars, heat map and texts"
    lacks: ClassVar[str] = "histograms"

    def lacks_some_of(self, panel: LogRecord) -> bool:
        """Histograms."""
        return bool(panel.histograms)

    def log_media(self, step: int, panel: LogRecord) -> None:
        """Logs texts."""
        for tag, text in panel.texts.items():
            self.logger.experiment.log_text(self.logger.run_id, text, f"{tag}.md")

    def log_picture(self, picture: Picture) -> None:
        """Logs a picture at the step that it shows."""
        run, pixels = self.logger.run_id, decode_png(picture.png)
        self.logger.experiment.log_image(run, pixels, key=picture.tag, step=picture.step)
