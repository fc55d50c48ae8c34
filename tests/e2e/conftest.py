"""Scripts that tests start in processes of their own are no tests."""

collect_ignore_glob = ["*_script.py"]
