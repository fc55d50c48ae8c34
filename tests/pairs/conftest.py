"""Leave out scripts that tests start."""

collect_ignore_glob = ["*_script.py"]
