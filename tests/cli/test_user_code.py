"""Objects are imported by module and name, and a wrong name is answered with the nearest one."""

import sys
from pathlib import Path

import pytest

from lightning_gradguard.cli.user_code import CommandError, import_object


@pytest.mark.parametrize("name", ["make", "Holder.make"])
def test_modules_in_the_current_folder_are_found(models, name):
    assert import_object(f"{models}:{name}", "--module") is sys.modules[models].make


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("models_to_cost", "--module must be MODULE:NAME, such as train:Model, got 'models_to_cost'"),
        (":make", "--module must be MODULE:NAME, such as train:Model, got ':make'"),
        ("model_to_cost:make", "cannot import model_to_cost: ModuleNotFoundError: No module named 'model_to_cost'; "
         "did you mean models_to_cost?"),
        ("models_to_cost:mak", "models_to_cost:mak: models_to_cost has no 'mak'; did you mean make?"),
        ("models_to_cost:Holder.mak", "models_to_cost:Holder.mak: models_to_cost has no 'mak'; did you mean make?"),
        ("broken_model:make", "cannot import broken_model: RuntimeError: no data here"),
    ],
)  # fmt: skip
def test_what_cannot_be_imported_is_reported_on_one_line(models, spec, words):
    Path("broken_model.py").write_text("raise RuntimeError('no data\\n here')")
    with pytest.raises(CommandError) as caught:
        import_object(spec, "--module")
    assert str(caught.value) == words
