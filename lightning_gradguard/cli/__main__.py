"""Run ``python -m lightning_gradguard.cli`` as ``gradguard``."""

from lightning_gradguard.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
