"""Scripts that tests start in processes of their own are no tests."""

collect_ignore = ["ddp_script.py"]
