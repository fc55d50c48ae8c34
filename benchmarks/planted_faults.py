"""Measure which small faults the tests notice: ``python benchmarks/planted_faults.py`` plants them one by one.

Each fault is one change to one file of the package: a comparison, a dropped reset, a wrong sign. It is planted in a
temporary copy, and the tests beside that file have to fail there. Takes about 20 minutes on one core. The exit status
is 1 if fewer than `AIM` faults are noticed. ``--only clippers`` plants those of one folder or file alone.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import multiprocessing
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PACKAGE = "lightning_gradguard"
#: Fewest faults that have to be noticed.
AIM = 90
#: Packages that are imported once here, and not again in each process that runs tests.
PRELOADED = (
    "torch",
    "lightning.pytorch",
    "torchmetrics",
    "tensorboard",
    "hypothesis",
    "scipy.stats",
    "matplotlib.figure",
)
#: What pytest says of a plugin that has been imported before.
KNOWN_WARNING = "ignore:Module already imported:pytest.PytestAssertRewriteWarning"
#: Seconds after which tests count as hanging, which notices the fault.
LIMIT = 300


class Planted(NamedTuple):
    """A fault to plant.

    Attributes:
        file: File of the package.
        old: Text that occurs in it once.
        new: Text that takes its place.
        tests: Test files beside it, separated by a space; a name below ``tests/`` without ``test_`` and ``.py``.
    """

    file: str
    old: str
    new: str
    tests: str


FAULTS = [
    Planted(
        "stats/collect.py",
        "if world_size() > 1 and (tilt_due or guess_due or loss is not None):",
        "if world_size() > 1 and tilt_due:",
        "stats/collect",
    ),
    Planted(
        "stats/collect.py",
        "tilt = rest[0] / rest[1] if self.tilt_due else None",
        "tilt = rest[0] if self.tilt_due else None",
        "stats/collect",
    ),
    Planted(
        "stats/sharding.py",
        "return mean / torch.distributed.get_world_size()",
        "return mean",
        "stats/sharding stats/collect",
    ),
    Planted(
        "stats/sharding.py",
        "return norms.to(torch.float64).square() * self.shares",
        "return norms.to(torch.float64).square()",
        "stats/sharding",
    ),
    Planted(
        "stats/sharding.py",
        "chunk = -(-(end - begin) // mesh.size(axis))",
        "chunk = (end - begin) // mesh.size(axis)",
        "stats/sharding",
    ),
    Planted(
        "stats/samples.py",
        "math.gcd(stride, width) > 1:",
        "math.gcd(stride, width) > width:",
        "stats/samples",
    ),
    Planted(
        "stats/samples.py",
        "changed = ((before != after) & fed).sum(1, dtype=torch.float32)",
        "changed = (before != after).sum(1, dtype=torch.float32)",
        "stats/samples detectors/updates",
    ),
    Planted(
        "stats/norms.py",
        "places = order if indices is None else [indices[i] for i in order]",
        "places = order",
        "stats/norms",
    ),
    Planted(
        "stats/histogram.py",
        "places.nan_to_num_(nan=0, posinf=0)",
        "places.nan_to_num_(nan=0, posinf=_BINS)",
        "stats/histogram",
    ),
    Planted(
        "stats/histogram.py",
        "nonfinite * column, squares * column,",
        "nonfinite * column, squares,",
        "stats/histogram",
    ),
    Planted(
        "stats/trends.py",
        "reach = torch.maximum(number(WINSOR_Z) * sigma, number(1.0))",
        "reach = number(WINSOR_Z) * sigma",
        "stats/trends",
    ),
    Planted(
        "stats/trends.py",
        "* (self.before.steps >= number(WARM_UP))",
        "* (self.before.steps > number(WARM_UP))",
        "stats/trends detectors/explosion",
    ),
    Planted(
        "stats/trends.py",
        "        slow_loss = torch.where(restarts, middle, slow_loss)\n",
        "",
        "stats/trends",
    ),
    Planted(
        "stats/trends.py",
        'torch.where(has_start, torch.minimum(known["best_loss"], loss), known["best_loss"])',
        'torch.where(has_start, loss, known["best_loss"])',
        "stats/trends detectors/explosion",
    ),
    Planted(
        "stats/trends.py",
        "total >= MIN_LAYERS, torch.nanmedian",
        "total > MIN_LAYERS, torch.nanmedian",
        "stats/trends",
    ),
    Planted(
        "stats/grad_stats.py",
        "has_output | self.hollow if self.is_marked(self.hollow) else has_output",
        "has_output",
        "stats/grad_stats detectors/detectors",
    ),
    Planted(
        "detectors/explosion.py",
        "good = stats.norms < infinite  # False for NaN",
        "good = ~(stats.norms >= infinite)",
        "detectors/detectors",
    ),
    Planted(
        "detectors/explosion.py",
        "settles = (stats.total < hot) & (stats.loss < hot_loss) & is_low",
        "settles = (stats.total < hot) & is_low",
        "detectors/detectors detectors/explosion",
    ),
    Planted(
        "detectors/explosion.py",
        "number(1.0), number(-stats.elapsed / 16))",
        "number(1.0), number(0.0))",
        "detectors/detectors detectors/explosion",
    ),
    Planted(
        "detectors/explosion.py",
        "loss_jumps = loss_jumps & (state.rose == 0)",
        "pass",
        "detectors/explosion",
    ),
    Planted(
        "detectors/depth.py",
        "steep = (trends.tilt >= 1.5 * self.limit) & is_main",
        "steep = trends.tilt >= 1.5 * self.limit",
        "detectors/detectors",
    ),
    Planted(
        "detectors/depth.py",
        "tilt = torch.where(stats.time_tilt.isnan(), state.decades, stats.time_tilt)",
        "tilt = stats.time_tilt",
        "detectors/detectors",
    ),
    Planted(
        "detectors/inactivity.py",
        "reached = seen > state.seen",
        "reached = stats.norms > 0",
        "engine/full_evaluations detectors/detectors",
    ),
    Planted(
        "detectors/inactivity.py",
        "dead = dead & ((depth < depth.max()) | (stats.norms == 0))",
        "dead = dead & (depth < depth.max())",
        "detectors/detectors",
    ),
    Planted(
        "detectors/updates.py",
        "recovers = lenient & (count < self.steps)",
        "recovers = lenient & (count <= self.steps)",
        "detectors/detectors detectors/updates",
    ),
    Planted(
        "detectors/updates.py",
        " & _is_short(norm) & ~_is_short(stats.total)",
        " & _is_short(norm)",
        "detectors/detectors detectors/updates",
    ),
    Planted(
        "detectors/updates.py",
        "replaced, 0.0, state.since + stats.elapsed)",
        "replaced, 0.0, state.since + 1)",
        "detectors/detectors detectors/updates",
    ),
    Planted(
        "detectors/scale.py",
        "held = torch.where(reach < self.limit, state.steps + stats.elapsed, 0.0)",
        "held = state.steps + stats.elapsed * (reach < self.limit)",
        "detectors/scale",
    ),
    Planted(
        "detectors/base.py",
        "cleared=~raised if cleared is None else cleared",
        "cleared=raised if cleared is None else cleared",
        "detectors/detectors",
    ),
    Planted(
        "clippers/base.py",
        "over = among(stats, included, (norms < number(torch.inf)) & (norms > limits))",
        "over = (norms < number(torch.inf)) & (norms > limits)",
        "clippers/base",
    ),
    Planted(
        "clippers/base.py",
        "torch.where(among(stats, included, norms != zeros), limits, others)",
        "torch.where(included, limits, others)",
        "clippers/base",
    ),
    Planted(
        "clippers/base.py",
        "torch.xlogy(self.weights, stats.norms).sum() - self.level",
        "torch.xlogy(self.weights, stats.norms).sum() + self.level",
        "engine/fast_path_bounds",
    ),
    Planted(
        "clippers/fixed.py",
        "limits = torch.clamp(weights, min=self.eps) * self.clip_factor",
        "limits = weights * self.clip_factor",
        "clippers/clippers clippers/agc",
    ),
    Planted(
        "clippers/adaptive.py",
        "new = _remember(number, state, norm, stats.finite & (norm > number(0.0)))",
        "new = _remember(number, state, norm, stats.finite)",
        "clippers/adaptive clippers/clippers",
    ),
    Planted(
        "clippers/adaptive.py",
        "torch.where(warm, change, rest) * rest",
        "rest * rest",
        "clippers/adaptive",
    ),
    Planted(
        "clippers/adaptive.py",
        "self._average(number, state, torch.where(outlier, adaptive, norm), warm)",
        "self._average(number, state, norm, warm)",
        "clippers/adaptive",
    ),
    Planted(
        "clippers/adaptive.py",
        "seen=state.seen + (stats.finite & (total > number(0.0))).to(torch.int64)",
        "seen=state.seen + stats.finite.to(torch.int64)",
        "clippers/adaptive clippers/clippers",
    ),
    Planted(
        "clippers/spike_clip.py",
        "streak=(state.streak + counts) * ~ordinary",
        "streak=state.streak + counts",
        "clippers/spike_clip",
    ),
    Planted(
        "clippers/spike_clip.py",
        "joint = torch.clamp(distance, -reach, reach).sum() / known_count",
        "joint = distance.sum() / known_count",
        "clippers/spike_clip",
    ),
    Planted(
        "engine/fast_path.py",
        "if total >= LARGEST_NORM:  # which may be less than twice the baseline",
        "if math.isinf(total):",
        "engine/fast_path_bounds engine/fast_path_reports",
    ),
    Planted(
        "engine/fast_path.py",
        "return {self._names[i]: numbers[i] for i in self._order if self._pattern[i]}",
        "return {self._names[i]: numbers[i] for i in self._order}",
        "engine/fast_path_reports",
    ),
    Planted(
        "engine/fault_tracker.py",
        "active.held = min(active.held + result.raised, self.policy.patience)\n            if",
        "active.held = min(active.held + 1, self.policy.patience)\n            if",
        "engine/fault_tracker",
    ),
    Planted(
        "engine/fault_tracker.py",
        "if last is not None and self.judged - last < SILENCE:",
        "if last is not None and self.judged - last <= SILENCE:",
        "engine/fault_tracker",
    ),
    Planted(
        "engine/fault_tracker.py",
        "        self.active.pop(Fault.NONFINITE.value, None)\n",
        "",
        "engine/fault_tracker",
    ),
    Planted(
        "engine/history.py",
        "column[before - self._added :].flatten()",
        "column[: self._added].flatten()",
        "engine/history",
    ),
    Planted(
        "engine/readback.py",
        "zip(places, scores, strict=True) if s > -math.inf)",
        "zip(places, scores, strict=True))",
        "engine/full_evaluations guard",
    ),
    Planted(
        "engine/parameter_tracker.py",
        "self.updates = torch.where(self._moved, ratios, self.updates)",
        "self.updates = ratios",
        "engine/parameter_tracker",
    ),
    Planted(
        "engine/parameter_tracker.py",
        "fell_at = self.fell_at if self.rested else steps",
        "fell_at = steps",
        "engine/parameter_tracker",
    ),
    Planted(
        "engine/parameter_tracker.py",
        '"terms": self._usual_terms,',
        '"terms": 0.0,',
        "engine/parameter_tracker",
    ),
    Planted(
        "engine/carried_gradients.py",
        "self._carried = self._carried + 1 if carried else 0",
        "self._carried = self._carried + bool(carried)",
        "engine/carried_gradients",
    ),
    Planted(
        "engine/device_skip.py",
        "        optimizer.register_step_post_hook(clear_found_inf)\n",
        "",
        "engine/device_skip",
    ),
    Planted(
        "engine/graph_observer.py",
        "self.reached |= frozenset(compress(layout.names, pattern))",
        "self.reached = frozenset(compress(layout.names, pattern))",
        "engine/graph_observer engine/ownership",
    ),
    Planted(
        "engine/ownership.py",
        "if old.raised and old.ceiling > Severity.INFO and not worst.certain:",
        "if old.raised and old.ceiling > Severity.INFO:",
        "engine/ownership",
    ),
    Planted(
        "guard.py",
        'self.counts["clipped"] += record.clipped and not report.skip',
        'self.counts["clipped"] += record.clipped',
        "guard",
    ),
    Planted(
        "guard.py",
        "        self.steps, self.counts = steps, counts\n        self._readback",
        "        self._readback",
        "guard",
    ),
    Planted(
        "guard.py",
        "rank = 2 * finding.severity - (finding.fault == Fault.SPIKE)",
        "rank = 2 * finding.severity",
        "guard",
    ),
    Planted(
        "policy.py",
        'all(self.respond.get(f.value) == "halt" for f in Fault)',
        'any(self.respond.get(f.value) == "halt" for f in Fault)',
        "policy engine/fault_tracker",
    ),
    Planted(
        "metrics.py",
        "(self.seen >= min(MIN_HISTORY, self.window))",
        "(self.seen >= MIN_HISTORY)",
        "metrics",
    ),
    Planted(
        "injections.py",
        "return step in self.at and self.rank in (None, rank)",
        "return step in self.at and self.rank in (None, 0)",
        "testing",
    ),
    Planted(
        "charts.py",
        "nan=np.inf, posinf=-1)",
        "nan=np.inf)",
        "charts",
    ),
    Planted(
        "introspection/batch.py",
        "bad.reshape(len(tensor), -1).any(1)",
        "bad.reshape(len(tensor), -1).all(1)",
        "introspection/batch",
    ),
    Planted(
        "introspection/sandbox.py",
        "            random.setstate(python)\n",
        "",
        "introspection/sandbox",
    ),
    Planted(
        "introspection/probes.py",
        "end = torch.where(norms > 0, places + 1, tenth).amax()",
        "end = len(norms)",
        "introspection/probes",
    ),
    Planted(
        "introspection/columns.py",
        "length[layer] += 1 + size * (uncovered >> layer & 1)",
        "length[layer] += 1 + (uncovered >> layer & 1)",
        "introspection/columns",
    ),
    Planted(
        "introspection/autograd_graph.py",
        'or (op == "Add" and inputs == 1)',
        'or op == "Add"',
        "introspection/autograd_graph",
    ),
    Planted(
        "introspection/graph_problems.py",
        "pending.append((inputs[0], -sign, scaled))",
        "pending.append((inputs[0], sign, scaled))",
        "introspection/graph_problems",
    ),
    Planted(
        "introspection/nonfinite_trace.py",
        "return min(genuine, key=lambda source: source.call)",
        "return genuine[-1]",
        "diagnosis/nan_origin introspection/nonfinite_trace",
    ),
    Planted(
        "introspection/loss_comparison.py",
        "if node.next_functions[0][0] is None:",
        "if node.next_functions[1][0] is None:",
        "introspection/loss_comparison",
    ),
    Planted(
        "introspection/layer_calls.py",
        "if count >= LOOP)",
        "if count > LOOP)",
        "introspection/layer_calls",
    ),
    Planted(
        "diagnosis/causes/__init__.py",
        "strongest[cause].weight <= weight:",
        "strongest[cause].weight >= weight:",
        "diagnosis/cause_rules",
    ),
    Planted(
        "diagnosis/causes/data.py",
        "abs(math.log10(rms)) < _NOTABLE_SCALE:",
        "math.log10(rms) < _NOTABLE_SCALE:",
        "diagnosis/cause_rules",
    ),
    Planted(
        "diagnosis/causes/numerics.py",
        "now < -_UNBOUNDED * max(abs(start), 1.0):",
        "now < -_UNBOUNDED * abs(start):",
        "diagnosis/cause_rules",
    ),
    Planted(
        "diagnosis/context.py",
        "f.fault in faults and f.step <= self.finding.step",
        "f.fault in faults and f.step < self.finding.step",
        "diagnosis/context diagnosis/cause_rules",
    ),
    Planted(
        "diagnosis/symptoms.py",
        "change = f\"{'shrink' if fall > 0 else 'grow'}",
        "change = f\"{'grow' if fall > 0 else 'shrink'}",
        "diagnosis/symptoms",
    ),
    Planted(
        "diagnosis/checkup.py",
        "bad = abs(gain) >= _GAIN_OF_A_LAYER and abs(gain) * layers > _GAIN",
        "bad = abs(gain) * layers > _GAIN",
        "diagnosis/checkup",
    ),
    Planted(
        "diagnosis/trials/runner.py",
        "beyond += [tilt - high, low - tilt]",
        "beyond += [tilt - high, tilt - low]",
        "diagnosis/trials/runner",
    ),
    Planted(
        "diagnosis/trials/change.py",
        "tensor[::2] if tensor.ndim else tensor",
        "tensor[: len(tensor) // 2] if tensor.ndim else tensor",
        "diagnosis/trials/change",
    ),
    Planted(
        "diagnosis/trials/weights.py",
        "keeps = slice(layer.hidden_size, 2 * layer.hidden_size)",
        "keeps = slice(0, layer.hidden_size)",
        "diagnosis/trials/weights",
    ),
    Planted(
        "callbacks/guard_registry.py",
        "return {**self.restored, **{str(i): guard.state_dict() for i, guard in self.guards.items()}}",
        "return {str(i): guard.state_dict() for i, guard in self.guards.items()}",
        "callbacks/rollback callbacks/grad_guard",
    ),
    Planted(
        "callbacks/rollback.py",
        "                    optimizer.state.pop(parameter, None)",
        "                    pass",
        "callbacks/snapshot",
    ),
    Planted(
        "callbacks/running_buffers.py",
        "return ~torch.isfinite(now) & torch.isfinite(before)",
        "return ~torch.isfinite(now)",
        "callbacks/running_buffers",
    ),
    Planted(
        "callbacks/trainer_adapter.py",
        "self._losses.append(plain if parts == 1 else plain * parts)",
        "self._losses.append(plain)",
        "callbacks/trainer_adapter",
    ),
    Planted(
        "callbacks/run_summary.py",
        "self.times += finding.step != self.newest",
        "self.times += 1",
        "callbacks/run_summary",
    ),
    Planted(
        "callbacks/run_logging.py",
        "return {**self._restored, **own}",
        "return own",
        "callbacks/run_logging",
    ),
    Planted(
        "callbacks/histogram_tensors.py",
        "self.after_step = global_step, self.step + 1, None",
        "self.after_step = global_step, global_step, None",
        "callbacks/grad_histogram",
    ),
    Planted(
        "loggers/base.py",
        "        self._failures = 0\n        return result",
        "        return result",
        "loggers/base",
    ),
    Planted(
        "loggers/histograms.py",
        "_spread(group, self._most - len(self._shown))",
        "group[: self._most - len(self._shown)]",
        "loggers/histograms",
    ),
    Planted(
        "loggers/overview.py",
        "taken = self._steps - self._skipped",
        "taken = self._steps",
        "loggers/overview",
    ),
    Planted(
        "loggers/tensorboard.py",
        "return value if abs(value) <= _SCALAR_LIMIT else math.nan",
        "return value if value <= _SCALAR_LIMIT else math.nan",
        "loggers/tensorboard",
    ),
    Planted(
        "html_report/event_reader.py",
        "key=lambda file: (file.began, file.path.name)",
        "key=lambda file: file.path.name",
        "html_report/event_reader",
    ),
    Planted(
        "html_report/figures.py",
        "            if len(known) < len(stretch):\n",
        "            if not len(known):\n",
        "html_report/figures",
    ),
    Planted(
        "html_report/summary.py",
        "findings[::-1][:LISTED],",
        "findings[:LISTED][::-1],",
        "html_report/summary html_report/page",
    ),
    Planted(
        "flight_recorder/bundle.py",
        'if (other["run"], other["rank"], other["world_size"]) == (bundle["run"], rank, world_size):',
        'if (other["rank"], other["world_size"]) == (rank, world_size):',
        "flight_recorder/bundle",
    ),
    Planted(
        "flight_recorder/bundle.py",
        "for path in own[: max(0, len(own) - keep)]:",
        "for path in own[: max(0, len(own) - keep - 1)]:",
        "flight_recorder/bundle",
    ),
    Planted(
        "flight_recorder/replay.py",
        "if passes + 2 > most:",
        "if passes > most:",
        "flight_recorder/replay",
    ),
    Planted(
        "flight_recorder/randomness.py",
        "return cuda and a.numpy == b.numpy and torch",
        "return cuda and torch",
        "flight_recorder/randomness",
    ),
    Planted(
        "flight_recorder/symptom.py",
        "(value <= limit if limit < 0 else value >= limit)",
        "value >= limit",
        "flight_recorder/symptom",
    ),
    Planted(
        "flight_recorder/serialization.py",
        "tensor = tensor.clone() if tensor.untyped_storage().nbytes() > own else tensor",
        "pass",
        "flight_recorder/serialization",
    ),
    Planted(
        "cli/replay.py",
        "if equals and name.isidentifier():",
        "if equals:",
        "cli/replay",
    ),
    Planted(
        "cli/main.py",
        '{error}"), file=sys.stderr)\n        return _USAGE_ERROR\n',
        '{error}"), file=sys.stderr)\n        return 1\n',
        "cli/cli",
    ),
]


def files_of_tests(fault: Planted) -> list[str]:
    """Return the paths of a fault's test files, relative to the root."""
    paths = [Path("tests", name) for name in fault.tests.split()]
    return [str(path.with_name(f"test_{path.name}.py")) for path in paths]


def occurrences(fault: Planted, root: Path = ROOT) -> int:
    """Return how often the text that the fault replaces occurs in its file."""
    return (root / PACKAGE / fault.file).read_text().count(fault.old)


def main() -> int:
    """Plant all faults; print which of them are noticed."""
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("--only", default="", help="plant the faults in files whose path begins so")
    faults = [fault for fault in FAULTS if fault.file.startswith(parser.parse_args().only)]
    for name in PRELOADED:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    with tempfile.TemporaryDirectory() as name:
        copy = Path(name) / "copy"
        shutil.copytree(
            ROOT,
            copy,
            ignore=shutil.ignore_patterns(".*", "__pycache__", "runs", "build", "dist", "test-artifacts"),
        )
        every = sorted({path for fault in faults for path in files_of_tests(fault)})
        if fails(copy, every, limit=None):
            print((copy / "output.txt").read_text()[-3000:])
            print("Without any fault the tests fail already.")
            return 2
        unnoticed = [fault for fault in faults if not is_noticed(copy, fault)]
    noticed = len(faults) - len(unnoticed)
    print(f"{noticed} of {len(faults)} planted faults are noticed.")
    return int(100 * noticed < AIM * len(faults))


def is_noticed(copy: Path, fault: Planted) -> bool:
    """Plant a fault, run the tests beside it, and remove it again."""
    if (count := occurrences(fault, copy)) != 1:
        raise ValueError(f"the text must occur once in {fault.file}, got {count} times: {fault.old!r}")
    path = copy / PACKAGE / fault.file
    before = path.read_text()
    path.write_text(before.replace(fault.old, fault.new))
    forget(path)
    noticed = fails(copy, files_of_tests(fault))
    path.write_text(before)
    forget(path)
    print(
        f"{'noticed' if noticed else 'UNNOTICED':9} {fault.file}: {fault.old!r} -> {fault.new!r}", flush=True
    )
    return noticed


def forget(path: Path) -> None:
    """Remove the compiled form of a file, which Python tells from a new one by its second and size alone."""
    for compiled in path.parent.glob(f"__pycache__/{path.stem}.*.pyc"):
        compiled.unlink()


def fails(copy: Path, tests: list[str], limit: float | None = LIMIT) -> bool:
    """Run tests in a process of their own; return True if one fails or hangs.

    Args:
        copy: Folder with the package and its tests.
        tests: Paths of test files in it.
        limit: Seconds after which tests count as hanging; None waits.

    Raises:
        RuntimeError: If there is no such test, or pytest cannot be used so.
    """
    process = multiprocessing.get_context("fork").Process(target=run, args=(copy, tests))
    process.start()
    process.join(limit)
    if process.exitcode is None:
        process.kill()
        process.join()
        return True
    if process.exitcode in (3, 4, 5):
        raise RuntimeError(f"pytest ended with status {process.exitcode} for {' '.join(tests)}")
    return process.exitcode != 0


def run(copy: Path, tests: list[str]) -> None:
    """Run tests in a copy, up to the first that fails."""
    import pytest

    os.chdir(copy)
    os.environ["PYTHONPATH"] = str(copy)
    sys.path.insert(0, str(copy))
    with open(copy / "output.txt", "w") as output, contextlib.redirect_stdout(output):
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
        status = pytest.main(["-x", "-m", "not slow", "-p", "no:cacheprovider", "-W", KNOWN_WARNING, *tests])
        output.flush()
    os._exit(int(status))


if __name__ == "__main__":
    sys.exit(main())
