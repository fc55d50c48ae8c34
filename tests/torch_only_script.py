"""Use everything that needs torch alone, while no other package can be found; print what happened as JSON.

``tests/test_torch_only.py`` runs it.
"""

import contextlib
import io
import json
import sys
import warnings

#: torch, and what it imports in each program. jinja2, which it asks for too, is left out on purpose.
FOUND = {
    *sys.stdlib_module_names, "lightning_gradguard", "torch", "torchgen", "functorch", "typing_extensions", "filelock",
    "fsspec", "sympy", "mpmath", "networkx",
}  # fmt: skip


class OnlyTorch:
    """Finder to which only torch, the standard library and this package exist."""

    def __init__(self, finders):
        self.finders = finders

    def find_spec(self, name, path=None, target=None):
        """Ask the other finders for what may be found."""
        root = name.partition(".")[0]
        if root in FOUND or root.startswith("_sysconfigdata"):  # a part of sysconfig
            for finder in self.finders:
                if (spec := finder.find_spec(name, path, target)) is not None:
                    return spec
        return None


def net():
    """Return twelve sigmoid layers, whose gradients vanish."""
    torch.manual_seed(0)
    layers = [layer for _ in range(12) for layer in (nn.Linear(8, 8), nn.Sigmoid())]
    return nn.Sequential(*layers, nn.Linear(8, 2))


def train(steps=40, fault=None, **options):
    """Return the guard, its last report and its halt after so many steps of the vanishing net."""
    model = net()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    guard = gradguard.Guard(model.named_parameters(), optimizer=optimizer, **options)
    report = halt = None
    try:
        for step in range(steps):
            x = torch.randn(16, 8, generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), (x.sum(1) > 0).long())
            with testing.inject(model.named_parameters(), fault or testing.NaN(at=steps), step=step):
                loss.backward()
            report = guard.step(loss=loss)
            if not report.skip:
                optimizer.step()
        guard.close()
    except gradguard.GradientHalt as error:
        halt = error
    return guard, report, halt


def missing(action):
    """Return the message about a missing package."""
    try:
        action()
    except ModuleNotFoundError as error:
        return f"{type(error).__name__}: {error}"
    raise AssertionError("nothing is missing")


def exported():
    """Import each exported name; return the messages about those that need more."""
    messages = {}
    for name in gradguard.__all__:
        try:
            getattr(gradguard, name)
        except ImportError as error:
            messages[name] = f"{type(error).__name__}: {error}"
    return messages


def parts():
    """Train with each detector and each clipper by itself; return what was judged, and the norms."""
    done = {}
    for name in gradguard.__all__:
        kind = getattr(gradguard, name) if name not in NEED_MORE else None
        if not (isinstance(kind, type) and hasattr(kind, "update") and hasattr(kind, "init")):
            continue
        try:
            part = kind()
        except TypeError:
            part = kind(1.0)
        is_clipper = kind.__module__.startswith("lightning_gradguard.clippers")
        options = {"clipper": part} if is_clipper else {"detectors": [gradguard.NonFinite(), part]}
        guard, report, halt = train(**options)
        assert halt is None
        done[name] = [guard.counts["judged"], len(report.norms), guard.history.tensors()["norms"].shape[0]]
        again = gradguard.Guard(net().named_parameters(), **options)
        again.load_state_dict(guard.state_dict())
    return done


def halts():
    """Halt for each of several faults; return what the diagnosis says."""
    texts = {}
    for name, fault in {
        "vanishing": None,
        "nonfinite": testing.NaN(at=30),
        "exploding": testing.Inf(at=20),
    }.items():
        _, _, halt = train(
            200, fault, policy=gradguard.Policy(respond={"vanishing": "halt", "nonfinite": "halt"})
        )
        assert halt.diagnosis.causes
        assert len(halt.diagnosis.to_markdown()) > 100
        texts[name] = [str(halt), missing(halt.diagnosis.to_html)]
    return texts


def records():
    """Encode random states and a batch as a flight record does, and back."""
    states = randomness.to_plain(randomness.capture())
    drawn = torch.rand(3)
    randomness.restore(randomness.from_plain(states))
    batch = {"x": torch.ones(2, 3), "names": ["a", "b"], "raw": b"ab"}
    left_out = []
    back = serialization.decode(serialization.encode(batch, "batch", left_out))
    assert torch.equal(back["x"], batch["x"])
    return [bool(torch.equal(drawn, torch.rand(3))), left_out, states["numpy"], repr(gradguard.Recorder())]


def commands():
    """Run the commands; return their exit status and what they say."""
    said = {}
    for words in (["report", "nowhere"], ["replay", "nowhere.pt"], ["cost", "torch:nn"], ["demo"]):
        with contextlib.redirect_stderr(io.StringIO()) as stream:
            status = cli.main(words)
        said[words[0]] = [status, stream.getvalue().strip()]
    return said


NEED_MORE = {"GradGuard", "GradHistogram", "ClipRate", "GradientNorm", "SpikeScore"}

if __name__ == "__main__":
    sys.meta_path[:] = [OnlyTorch(list(sys.meta_path))]
    warnings.filterwarnings("ignore", message="Failed to initialize NumPy")  # torch says so by itself

    import torch
    from torch import nn

    import lightning_gradguard as gradguard
    from lightning_gradguard import cli, testing
    from lightning_gradguard.flight_recorder import randomness, serialization

    warnings.simplefilter("ignore", gradguard.GradientWarning)
    guard, _, _ = train(3)
    batch = torch.randn(16, 8), torch.ones(16).long()
    result = {
        "exported": exported(),
        "parts": parts(),
        "halts": halts(),
        "records": records(),
        "commands": commands(),
        "checkup": str(gradguard.checkup(net(), batch, loss=nn.functional.cross_entropy)),
        "table": missing(guard.history.table),
        "modules": sorted({name.partition(".")[0] for name in sys.modules}),
        "all": gradguard.__all__,
    }
    print(json.dumps(result))
