"""Small language model on Python's standard library, trained with each clipper and with broken batches."""
