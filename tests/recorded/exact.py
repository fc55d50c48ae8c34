"""Renders what the package says as plain data in which every bit shows, and as digests of it."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from enum import Enum
from pathlib import Path

import torch

#: Fields that are words for people; they are kept apart, so that they may be changed on purpose.
WORDS = ("measure",)


class Run:
    """Collects what one run gives: facts, which must not change, and text, which may.

    Attributes:
        facts: Plain data; floats are hexadecimal.
        text: The same for what is wording.
    """

    def __init__(self):
        self.facts, self.text = {}, {}

    def findings(self, findings):
        """Keeps findings in full."""
        self.facts["findings"] = [finding_of(finding) for finding in findings]
        self.text["findings"] = [[finding.measure, str(finding)] for finding in findings]

    def reports(self, reports, *, keep=False):
        """Keeps a digest of each report, the first step with a finding, and all numbers with ``keep``."""
        rendered = [report_of(report) for report in reports]
        self.facts["steps"] = [digest(one) for one in rendered]
        first = next((report.step for report in reports if report.findings), None)
        self.facts["first found"] = first
        if keep:
            self.facts["reports"] = rendered
        self.text["reports"] = [repr(report) for report in (*reports[:1], *reports[-1:])]

    def diagnosis(self, diagnosis):
        """Keeps the fields of a diagnosis that are not prose, and apart from them those that are."""
        if diagnosis is None:
            self.facts["diagnosis"] = self.text["diagnosis"] = None
            return
        self.facts["diagnosis"] = {
            "fault": diagnosis.fault.value,
            "step": diagnosis.step,
            "parameters": list(diagnosis.parameters),
            "causes": [cause.value for cause in diagnosis.causes],
            "evidence": [cause.value for cause in diagnosis.evidence],
            "remedies": [
                [remedy.tried, *(plain(number) for number in (remedy.before, remedy.after, remedy.loss))]
                for remedy in diagnosis.remedies
            ],
        }
        self.text["diagnosis"] = {
            "signs": list(diagnosis.signs),
            "evidence": list(diagnosis.evidence.values()),
            "remedies": [[remedy.name, remedy.how, remedy.note] for remedy in diagnosis.remedies],
            "text": str(diagnosis),
            "markdown": digest(diagnosis.to_markdown()),
            "html": digest(diagnosis.to_html()),
        }

    def halt(self, halt):
        """Keeps what a halt carries; ``None`` if there was none."""
        self.facts["halted"] = None if halt is None else halt.step
        if halt is not None:
            self.diagnosis(halt.diagnosis)
            self.facts["halt's findings"] = [finding_of(finding) for finding in halt.findings]
            self.text["halt"] = str(halt)

    def state(self, state):
        """Keeps a digest of a saved state."""
        leaves = leaves_of(state)
        self.facts["state"] = [len(leaves), digest(sorted(leaves))]
        self.text["state's names"] = sorted(set(names_of(state)))

    def warned(self, messages):
        """Keeps how often something was said, and what."""
        self.facts["warnings"] = len(messages)
        self.text["warnings"] = messages


def plain(value):
    """Renders a value as data for JSON; floats are hexadecimal, tensors digests of their bytes."""
    if isinstance(value, Enum):
        return plain(value.value)
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value).hex()
    if isinstance(value, torch.Tensor):
        return tensor_of(value)
    if isinstance(value, Mapping):
        return [[plain(key), plain(entry)] for key, entry in value.items()]
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    raise TypeError(f"value must be plain, got {type(value).__name__}: {value!r}")


def digest(value):
    """Gives 16 digits of the SHA-256 of plain data."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def tensor_of(tensor):
    """Renders type, shape and bytes of a tensor."""
    whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    flat = whole.detach().cpu().contiguous().reshape(-1)
    content = flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
    return f"{whole.dtype} {list(whole.shape)} {hashlib.sha256(content).hexdigest()[:16]}"


def weights_of(module):
    """Gives a digest of all parameters and buffers of a module."""
    return digest([[name, tensor_of(tensor)] for name, tensor in module.state_dict().items()])


def finding_of(finding):
    """Renders a finding without its words."""
    return {name: value for name, value in named(finding).items() if name not in WORDS}


def report_of(report):
    """Renders a report without the words of its findings."""
    shown = named(report)
    return shown | {"findings": [finding_of(finding) for finding in report.findings]}


def named(instance):
    """Renders a dataclass, by the names of its fields."""
    return {name: plain(value) for name, value in dataclasses.asdict(instance).items() if name != "findings"}


def leaves_of(state):
    """Gives the values of a nested state as text, whatever holds them and by what name."""
    if isinstance(state, Mapping):
        state = list(state.values())
    if isinstance(state, list | tuple | set | frozenset):
        return [leaf for entry in state for leaf in leaves_of(entry)]
    return [f"{type(state).__name__} {json.dumps(plain(state))}"]


def names_of(state, above=""):
    """Gives the keys of a nested state, dotted; places in a list are stars."""
    if isinstance(state, Mapping):
        pairs = [(str(key), value) for key, value in state.items()]
    elif isinstance(state, list | tuple):
        pairs = [("*", value) for value in state]
    else:
        return [above]
    return [name for key, value in pairs for name in names_of(value, f"{above}.{key}" if above else key)]


def without_folder(text, folder):
    """Gives a text in which a temporary folder has a name of its own."""
    return text.replace(str(Path(folder).resolve()), "FOLDER").replace(str(folder), "FOLDER")
