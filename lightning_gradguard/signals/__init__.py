"""Device code: tensors in, tensors out; no host read, no branch on data."""
