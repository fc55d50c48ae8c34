"""Extension for mkdocstrings: render an ``Example`` section of a docstring as code."""

from typing import Any

from griffe import Extension, Object


class Sections(Extension):
    """Rename ``Example`` to ``Examples``, the heading that Griffe parses as code."""

    def on_instance(self, *, obj: Object, **_: Any) -> None:
        """Rename the section before the docstring is parsed."""
        if obj.docstring is not None:
            obj.docstring.value = obj.docstring.value.replace("\nExample:\n", "\nExamples:\n")
