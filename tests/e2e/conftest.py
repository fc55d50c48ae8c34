"""Let tests import the scripts that they start, which are not collected."""

import sys
from pathlib import Path

collect_ignore_glob = ["*_script.py"]
sys.path.insert(0, str(Path(__file__).parent))
