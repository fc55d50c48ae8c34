"""The ``gradguard`` command."""

from lightning_gradguard.cli.main import main as main
