"""The one pass over the gradients, and the running statistics that detectors and clippers share."""
