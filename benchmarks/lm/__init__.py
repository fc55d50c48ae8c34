"""A small language model on the sources of Python's standard library, trained under clippers and broken batches."""
