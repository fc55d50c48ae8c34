"""Diagnosis of a critical finding: symptoms, causes, fixes, and trials of them."""
