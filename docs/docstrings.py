"""What mkdocstrings has to be told of the docstrings here: an ``Example`` is a section of code, and no remark."""

from typing import Any

from griffe import Extension, Object


class Sections(Extension):
    """Gives a docstring's example the heading under which Griffe takes it for code."""

    def on_instance(self, *, obj: Object, **_: Any) -> None:
        """Renames the section, before anything is parsed."""
        if obj.docstring is not None:
            obj.docstring.value = obj.docstring.value.replace("\nExample:\n", "\nExamples:\n")
