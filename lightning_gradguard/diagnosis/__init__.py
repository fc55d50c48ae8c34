"""Diagnosis of a critical finding.

`diagnose` gathers the facts into a `DiagnosticContext`; symptoms, causes and fixes are found from it, fixes are tried,
and rendering writes the `Diagnosis` as text, Markdown or HTML.
"""
