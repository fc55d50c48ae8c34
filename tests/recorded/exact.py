"""Rendering of results as plain data that shows every bit, and as digests of it."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from enum import Enum
from pathlib import Path

import torch

#: Fields with wording for people; kept apart, since wording may change on purpose.
WORDS = ("measure",)


class Run:
    """Record of one run: facts, which must not change, and text, which may.

    Attributes:
        facts: Plain data; floats are hexadecimal.
        text: Plain data with wording.
    """

    def __init__(self):
        self.facts, self.text = {}, {}

    def findings(self, findings):
        """Record findings in full."""
        self.facts["findings"] = [finding_of(finding) for finding in findings]
        self.text["findings"] = [[finding.measure, str(finding)] for finding in findings]

    def reports(self, reports, *, keep=False):
        """Record a digest of each report and the first step with a finding; with ``keep`` all numbers."""
        rendered = [report_of(report) for report in reports]
        self.facts["steps"] = [digest(one) for one in rendered]
        first = next((report.step for report in reports if report.findings), None)
        self.facts["first found"] = first
        if keep:
            self.facts["reports"] = rendered
        self.text["reports"] = [repr(report) for report in (*reports[:1], *reports[-1:])]

    def diagnosis(self, diagnosis):
        """Record a diagnosis, with its prose fields apart from the others."""
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
        """Record the contents of a halt; ``None`` if there was none."""
        self.facts["halted"] = None if halt is None else halt.step
        if halt is not None:
            self.diagnosis(halt.diagnosis)
            self.facts["halt's findings"] = [finding_of(finding) for finding in halt.findings]
            self.text["halt"] = str(halt)

    def state(self, state):
        """Record a digest of a saved state."""
        leaves = leaves_of(state)
        self.facts["state"] = [len(leaves), digest(sorted(leaves))]
        self.text["state's names"] = sorted(set(names_of(state)))

    def warned(self, messages):
        """Record the messages and their number."""
        self.facts["warnings"] = len(messages)
        self.text["warnings"] = messages


def plain(value):
    """Render a value as data for JSON: floats as hexadecimal, tensors as digests of their bytes."""
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
    """Return 16 digits of the SHA-256 of plain data."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def tensor_of(tensor):
    """Render dtype, shape and bytes of a tensor."""
    whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    flat = whole.detach().cpu().contiguous().reshape(-1)
    content = flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
    return f"{whole.dtype} {list(whole.shape)} {hashlib.sha256(content).hexdigest()[:16]}"


def weights_of(module):
    """Return a digest of all parameters and buffers of a module."""
    return digest([[name, tensor_of(tensor)] for name, tensor in module.state_dict().items()])


def finding_of(finding):
    """Render a finding without its wording."""
    return {name: value for name, value in named(finding).items() if name not in WORDS}


def report_of(report):
    """Render a report without the wording of its findings."""
    shown = named(report)
    return shown | {"findings": [finding_of(finding) for finding in report.findings]}


def named(instance):
    """Render a dataclass by its field names."""
    return {name: plain(value) for name, value in dataclasses.asdict(instance).items() if name != "findings"}


def leaves_of(state):
    """Return the values of a nested state as text, independent of containers and names."""
    if isinstance(state, Mapping):
        state = list(state.values())
    if isinstance(state, list | tuple | set | frozenset):
        return [leaf for entry in state for leaf in leaves_of(entry)]
    return [f"{type(state).__name__} {json.dumps(plain(state))}"]


def names_of(state, above=""):
    """Return the dotted keys of a nested state; list indices become stars."""
    if isinstance(state, Mapping):
        pairs = [(str(key), value) for key, value in state.items()]
    elif isinstance(state, list | tuple):
        pairs = [("*", value) for value in state]
    else:
        return [above]
    return [name for key, value in pairs for name in names_of(value, f"{above}.{key}" if above else key)]


def without_folder(text, folder):
    """Return the text with a placeholder for a temporary folder."""
    return text.replace(str(Path(folder).resolve()), "FOLDER").replace(str(folder), "FOLDER")
