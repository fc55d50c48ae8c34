"""Sick and healthy trainings whose truth is known; see ``case.py`` for what a case is."""
