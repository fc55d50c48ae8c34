"""Lets the modules here import each other, as they do where `record.py` is run as a script."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
