"""The module of a bundle, built from its class and the recorded hyper-parameters."""

from pathlib import Path

import pytest

from lightning_gradguard import ReplayError
from lightning_gradguard.flight_recorder.rebuild_module import build, parse_arguments

SOURCE = """
from torch import nn

class Model(nn.Module):
    def __init__(self, width, depth=2, **rest):
        super().__init__()
        self.width, self.depth, self.rest = width, depth, rest
    class Inner(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.width = width

class OfOne(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config

def make(width):
    return Model(width)

def number(width):
    return 3

class Fails(nn.Module):
    def __init__(self, net):
        raise RuntimeError("no net")
"""


@pytest.fixture(autouse=True)
def _source(monkeypatch, request):
    name = "own_" + "".join(c if c.isalnum() else "_" for c in request.node.name)
    Path(f"{name}.py").write_text(SOURCE)
    request.node.module_name = name


@pytest.fixture
def module_name(request):
    return request.node.module_name


def bundle(argument="kwargs", left_out=(), **values):
    return {"hyper_parameters": {"values": values, "argument": argument, "left_out": list(left_out)}}


def test_recorded_and_given_arguments(module_name):
    module = build(f"{module_name}:Model", bundle(width=4, depth=3, lr=0.1, _class_path="x"), {"depth": 5})
    assert (module.width, module.depth, module.rest) == (4, 5, {"lr": 0.1})


def test_only_what_it_takes_is_given(module_name):
    assert build(f"{module_name}:Model.Inner", bundle(width=4, other=1), {}).width == 4
    assert build(f"{module_name}:make", bundle(width=4, other=1), {}).width == 4


def test_all_in_one_argument(module_name):
    assert build(f"{module_name}:OfOne", bundle("config", a=1, b=2), {}).config == {"a": 1, "b": 2}


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("no_such_package:Model", "could not be imported: ModuleNotFoundError"),
        ("{}:NoSuchClass", "could not be imported: AttributeError"),
        ("{}", "--module must be a module and a class, such as train:Model"),
        (":Model", "--module must be"),
        ("{}:number", "must give a module, got int"),
        ("{}:Model", r"could not be built from no arguments: TypeError: .*width.*; give others with --args"),
        ("{}:Fails", r"could not be built from .*not plain, so not recorded: net \(Linear\); give"),
    ],
)
def test_what_goes_wrong_is_one_line(module_name, spec, words):
    recorded = bundle(width=1) if spec.endswith("number") else bundle(left_out=["net (Linear)"])
    with pytest.raises(ReplayError, match=words) as caught:
        build(spec.format(module_name), recorded, {})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("texts", "arguments"),
    [
        ([], {}),
        (["lr=0.1", "name=adam", "deep=true"], {"lr": 0.1, "name": "adam", "deep": True}),
        (["layers=[1, 2]"], {"layers": [1, 2]}),
        (['{"a": 1}', "b=x=y"], {"a": 1, "b": "x=y"}),
        (["empty="], {"empty": ""}),
    ],
)  # fmt: skip
def test_arguments_as_they_are_typed(texts, arguments):
    assert parse_arguments(texts) == arguments


@pytest.mark.parametrize("text", ["lr", "[1]", "a b=1", "3"])
def test_arguments_that_are_none(text):
    with pytest.raises(ReplayError, match="--args must be name=value or a JSON object, got"):
        parse_arguments([text])
