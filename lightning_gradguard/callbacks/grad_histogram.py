"""`GradHistogram`: write histograms of gradients, weights, updates and activations."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import cache, cached_property, partial
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_gradguard.callbacks.compatibility import refuse_hidden_gradients
from lightning_gradguard.callbacks.grad_guard import GradGuard
from lightning_gradguard.callbacks.histogram_tensors import (
    Counted,
    OptimizerTensors,
    parse_counts,
    read_counts,
    table_of,
)
from lightning_gradguard.callbacks.name_patterns import NamePatterns
from lightning_gradguard.callbacks.trainer_adapter import (
    Callback,
    is_early,
    is_placeholder,
    is_step_without_loss,
    logging_step,
    optimizer_index,
    scaler_of,
    warn,
)
from lightning_gradguard.diagnosis.wording import quote
from lightning_gradguard.engine.arguments import short_repr
from lightning_gradguard.engine.parameter_tracker import unscale
from lightning_gradguard.engine.readback import read
from lightning_gradguard.forms import Each, check_form, short
from lightning_gradguard.introspection.activations import ActivationProbe
from lightning_gradguard.loggers import open_sinks
from lightning_gradguard.loggers.base import FailSafe, LogRecord, LogSink, merge_records
from lightning_gradguard.loggers.histograms import (
    QUANTITIES,
    THRESHOLDS,
    Quantity,
    ShownTensors,
    activations_record,
    exponents_record,
    histogram_record,
    update_ratio_record,
)
from lightning_gradguard.loggers.tags import tag_group
from lightning_gradguard.stats.histogram import (
    AXES,
    Axis,
    Samples,
    count,
    count_samples,
    sample,
)
from lightning_gradguard.stats.parameters import members, select
from lightning_gradguard.stats.sharding import align_gradients, is_sharded, local
from lightning_gradguard.validation import check_whole

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

#: Newest findings of a guard whose tensors are shown.
NEWEST = 16
#: Of weights and updates so many times fewer elements are read than of gradients.
FEWER = 4
#: Of gradients that are not shown so many times fewer; they are counted for the case that a guard names them.
ASIDE = 8

_FORM = {"shown": Each({"steps": int, "shown": [str], "named": [str]}), "activations": [str]}


class GradHistogram(Callback):
    """Callback that writes histograms to TensorBoard.

    They are written at steps 0, 1, 2, 5, 10, 20 and 50, and every ``every_n_steps``. The tag of a gradient is
    ``gradguard_hist_log10/`` and the parameter's full name. A resumed run goes on with the same tensors.

    A histogram shows log10 of the gradient's magnitude, on a fixed axis from -12 to 3. Gradients that drift to the left
    vanish, those that drift to the right explode, and a high bar at the left edge counts exact zeros. If the callback
    stands before a `GradGuard` that clips, it shows gradients before clipping, else after clipping.

    On request, with ``of``, it shows more of the same tensors:

    - "weight", ``gradguard_weight_log10/``: weights before the step.
    - "update", ``gradguard_update_log10/``: what the optimizer's step added to the weights. The scalar
      ``gradguard_update_ratio_log10/`` is log10 of its size relative to the weight.
    - "activation", ``gradguard_activation_log10/``: outputs of leaf modules in training. Hooks are there at the steps
      that are shown alone. The text ``gradguard_activations/table`` has the shares of saturated and of dead units.
      Activations that the module computes by functions, such as ``torch.relu``, are not seen, and compiled and scripted
      modules are left out. Among several processes it shows those of the first.

    With ``axis="value"`` a histogram shows values, as ``gradguard_hist_value/name``. It has 30 equal bins around zero.
    The axis ends at the largest magnitude or at 4 root mean squares, whichever is smaller, and the outer bins count
    everything beyond.

    With ``exponents=True`` the callback also shows which share of the gradient would lose digits or become zero in
    fp16, bf16 and two formats of fp8: scalars over all tensors, and a table by tensor in the text tab,
    ``gradguard_exponents/``.

    By default 4,096 elements of each tensor are read. In 95 of 100 histograms no cumulative share is then off by more
    than 2.1 % (see `lightning_gradguard.stats.histogram.count`). Of weights and updates a quarter as many are read,
    which gives 4.2 %. Of a gradient that is not among those shown an eighth as many are read, which gives 6.0 %: it has
    a histogram at once if a `GradGuard` names it. Of a sharded tensor each rank reads that many elements of its part.

    Example:
        >>> from lightning_gradguard import GradHistogram
        >>> histogram = GradHistogram(every_n_steps=50, exclude=["*.bias"], of=("gradient", "update"))

    Args:
        every_n_steps: Optimizer steps between two histograms, after the first ones.
        include: Patterns of parameter names to show, such as "encoder.*"; all when None. A module's activations are
            shown if a pattern matches its name or that of a parameter of its own.
        exclude: Patterns of parameter names to leave out, and of modules.
        max_tensors: Largest number of tensors shown at a time, and of modules. If more match, they are spread evenly
            over the model, weights of layers first, the same in every run. Tensors that a `GradGuard` names in a
            finding or a diagnosis are shown besides, up to the same number.
        max_samples: Largest number of elements read of each tensor, evenly strided; None reads all of them.
        axis: "log10" for magnitudes, "value" for values.
        exponents: Also show what narrow number formats would lose.
        of: What to show: any of "gradient", "weight", "update" and "activation".

    Raises:
        ValueError: If a number is not a whole number, 1 or more, if ``axis`` is neither of the two, or if ``of`` is
            empty or names something else.
        TypeError: If a number is of another type, patterns or ``of`` are not a sequence of strings, or ``exponents`` is
            not a bool.
    """

    def __init__(
        self,
        *,
        every_n_steps: int = 100,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
        max_tensors: int = 24,
        max_samples: int | None = 4096,
        axis: Axis = "log10",
        exponents: bool = False,
        of: Sequence[Quantity] = ("gradient",),
    ) -> None:
        check_whole("every_n_steps", every_n_steps)
        check_whole("max_tensors", max_tensors)
        if max_samples is not None:
            check_whole("max_samples", max_samples)
        if axis not in AXES:
            raise ValueError(f"axis must be {' or '.join(map(repr, AXES))}, got {axis!r}")
        if not isinstance(exponents, bool):
            raise TypeError(f"exponents must be True or False, got {exponents!r}")
        _check_quantities(of)
        self.every_n_steps, self.max_tensors, self.max_samples = every_n_steps, max_tensors, max_samples
        self.include, self.exclude = include, exclude
        self.axis, self.exponents, self.of = axis, exponents, tuple(of)
        self._patterns = NamePatterns(include, exclude)
        self._shown: dict[int, OptimizerTensors] = {}
        self._restored: dict[str, Any] = {}
        self._modules = ShownTensors(max_tensors)
        self._probe: ActivationProbe | None = None
        self._loss: Tensor | None = None
        self._sinks: list[LogSink] = []
        self._fail_safe = FailSafe("GradHistogram")
        self._activations_fail_safe = FailSafe("GradHistogram, activations,")
        # By the id of a guard: its newest finding and diagnosis that were looked at.
        self._heard: dict[int, tuple[object, object]] = {}

    def __repr__(self) -> str:
        return short_repr(
            self,
            every_n_steps=(self.every_n_steps, 100),
            include=(self.include, None),
            exclude=(self.exclude, None),
            max_tensors=(self.max_tensors, 24),
            max_samples=(self.max_samples, 4096),
            axis=(self.axis, "log10"),
            exponents=(self.exponents, False),
            of=(self.of, ("gradient",)),
        )

    def __getstate__(self) -> dict[str, Any]:
        # A copy writes nowhere, since an open file has one writer.
        released: dict[str, Any] = {
            "_sinks": [],
            "_loss": None,
            "_shown": {},
            "_probe": None,
            "_heard": {},
        }
        return {**self.__dict__, **released, "_restored": self.state_dict()}

    @cached_property
    def state_key(self) -> str:
        """Checkpoint key, equal for equal configuration."""
        names = (
            "every_n_steps", "include", "exclude", "max_tensors", "max_samples", "axis", "exponents", "of",
        )  # fmt: skip
        return self._generate_state_key(**{name: getattr(self, name) for name in names})

    def state_dict(self) -> dict[str, Any]:
        """Return which tensors are shown, as plain types."""
        own = {str(index): tensors.state_dict() for index, tensors in self._shown.items()}
        shown = {**self._restored.get("shown", {}), **own}
        return {"shown": shown, "activations": self._modules.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Hold the state until the optimizers are known."""
        self._restored = state_dict

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse strategies that hide gradients.

        Raises:
            MisconfigurationException: Lightning's own, under such a strategy.
        """
        if stage == "fit":
            refuse_hidden_gradients(trainer, "GradHistogram", "show")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the loggers; warn of hidden tensors."""
        self._shown, self._fail_safe, self._heard = {}, FailSafe("GradHistogram"), {}
        self._activations_fail_safe = FailSafe("GradHistogram, activations,")
        self._modules = ShownTensors(self.max_tensors)
        self._restore(trainer)
        self._sinks = open_sinks(trainer.loggers) if trainer.is_global_zero else []
        if not trainer.loggers and _first_time("no logger"):
            warn(
                trainer,
                "GradHistogram: nothing is written, since the Trainer has no logger. Use "
                "Trainer(logger=TensorBoardLogger(...)), or remove GradHistogram.",
            )
        named = list(pl_module.named_parameters())
        names = list(select(named, None)) if named else []
        if "activation" in self.of:
            names += [name for name, _ in pl_module.named_modules() if name]
        for problem in self._patterns.problems(names):
            warn(trainer, f"GradHistogram: {problem}")
        if self.axis == "value" and any(is_sharded(p) for _, p in named):
            warn(
                trainer,
                'GradHistogram: sharded gradients are left out, since axis="value" cannot show them. Use axis="log10".',
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the modules whose activations are shown."""
        self._probe = None
        if "activation" not in self.of or not self._sinks:
            return
        self._probe = ActivationProbe(pl_module, self._patterns.match_module, self.max_samples)
        if left_out := self._probe.left_out:
            warn(
                trainer,
                f"GradHistogram: activations inside compiled or scripted modules are left out: {_listed(left_out)}. "
                "Everything else is shown. To see them, train some steps without compiling.",
            )

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Forget the last batch's loss; listen to modules if this batch is shown."""
        self._loss = None
        if self._probe is not None and any(map(self._is_due, self._next_steps(trainer))):
            self._probe.start()

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Keep the loss; stop listening, since checkpointed modules are called again in backward."""
        self._loss = loss
        if self._probe is not None:
            self._probe.stop()

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Count and write, if this step is shown."""
        loss, self._loss = self._loss, None
        if is_placeholder(optimizer):
            return
        index = optimizer_index(trainer, optimizer)
        if index not in self._shown:
            self._shown[index] = self._new_tensors(trainer, index, optimizer)
        tensors = self._shown[index]
        # An optimizer such as LBFGS calls its closure several times in a step.
        due = self._is_due(tensors.next_step(trainer.global_step))
        if not tensors.start_step(trainer.global_step, hook=due and "update" in self.of):
            return
        # A resumed run counts once before it shows anything, for the case that a guard names a tensor.
        if not due and tensors.counted is not None:
            return
        if is_step_without_loss(pl_module, scaler_of(trainer), loss):
            return
        # If gradients are sharded, every rank has to take part, also rank 0 when its loggers have failed.
        if self._sinks or (trainer.loggers and any(map(is_sharded, members(optimizer)))):
            self._fail_safe.run(lambda: self._show(trainer, pl_module, index, optimizer))

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Remove all hooks."""
        for tensors in self._shown.values():
            tensors.close()
        if self._probe is not None:
            self._probe.stop()
        self._show_named(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the loggers, after a guard has judged its last steps in ``on_train_end``."""
        self._close(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Close the loggers."""
        self._close(trainer)

    def _is_due(self, step: int) -> bool:
        return step % self.every_n_steps == 0 or is_early(step)

    def _next_steps(self, trainer: Trainer) -> Iterable[int]:
        """Return the number of the coming step of each optimizer."""
        if not self._shown:
            return [trainer.global_step // max(1, len(trainer.optimizers))]
        return [tensors.next_step(trainer.global_step) for tensors in self._shown.values()]

    def _restore(self, trainer: Trainer) -> None:
        """Continue with the state of a checkpoint, if there is one."""
        state, self._restored = self._restored if trainer.ckpt_path else {}, {}
        if not state:
            return
        try:
            check_form(state, _FORM, "the state")
            self._modules.load_state_dict(state["activations"])
            self._restored = dict(state)
        except ValueError as error:
            self._warn_of_damage(trainer, error)

    def _warn_of_damage(self, trainer: Trainer, error: ValueError) -> None:
        warn(
            trainer,
            "GradHistogram: the choice of tensors begins anew, since its saved state is damaged "
            f"({short(str(error))}).",
        )

    def _new_tensors(
        self, trainer: Trainer, index: int, optimizer: torch.optim.Optimizer
    ) -> OptimizerTensors:
        """Return an optimizer's tensors, as a checkpoint has them."""
        steps = trainer.global_step // max(1, len(trainer.optimizers))
        tensors = OptimizerTensors(optimizer, ShownTensors(self.max_tensors), steps)
        state = self._restored.get("shown", {}).get(str(index))
        try:
            if state is not None:
                tensors.load_state_dict(state)
        except ValueError as error:
            self._warn_of_damage(trainer, error)
        return tensors

    def _show(
        self, trainer: Trainer, module: LightningModule, index: int, optimizer: torch.optim.Optimizer
    ) -> None:
        """Count, and write what is shown."""
        tensors, scaler = self._shown[index], scaler_of(trainer)
        tensors.update(module)
        if scaler is not None:  # gradients are still scaled before a fused optimizer's step
            unscale(optimizer, scaler)
        wanted = self._wanted(tensors.parameters)
        sharded = any(map(is_sharded, wanted.values()))
        if sharded:
            align_gradients(list(wanted.values()))
        due, with_gradient = self._is_due(tensors.step), [n for n, p in wanted.items() if p.grad is not None]
        shown = tensors.choose(with_gradient) if due else []
        gradients = self._count_gradients(wanted, shown, sharded=sharded)
        step, group = logging_step(trainer), tag_group(index)
        counted = {name: gradients[name] for name in with_gradient}
        tensors.counted, tensors.counted_at = counted, step
        if not due:
            return
        # All ranks count the parts of a sharded weight, but only the first one has chosen.
        kept = dict(wanted) if sharded else {name: wanted[name] for name in shown}
        records = []
        if kept and "update" in self.of:
            tensors.after_step = partial(
                self._fail_safe.run, self._log_update, kept, shown, step, group, list(self._sample(kept))
            )
        elif kept and "weight" in self.of:
            weights = read_counts(kept, count_samples(self._sample(kept), axis=self.axis))
            records.append(self._record("weight", {name: weights[name] for name in shown}, group))
        # From here on nothing waits for another rank.
        if shown and "gradient" in self.of:
            records.append(self._record("gradient", {name: counted[name] for name in shown}, group))
        if shown and self.exponents:
            below = {name: c.below for name, c in counted.items()}
            records.append(exponents_record(below, shown, step=step, group=group))
        self._log(step, records)
        if self._probe is not None:
            self._activations_fail_safe.run(self._show_activations, step)

    def _show_named(self, trainer: Trainer) -> None:
        """Show what a guard has named since the last call, as it was counted last.

        A message sends its reader to the histogram of each tensor that it names, which may not be shown otherwise.
        """
        heard, self._heard = self._heard, {}
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if not isinstance(callback, GradGuard):
                continue
            found, diagnosis = callback.findings[-NEWEST:], callback.diagnosis
            newest = found[-1] if found else None
            finding_before, diagnosis_before = heard.get(id(callback), (None, None))
            self._heard[id(callback)] = newest, diagnosis
            names = {n for f in found for n in f.parameters} if newest is not finding_before else set()
            is_new = diagnosis is not None and diagnosis is not diagnosis_before
            text = str(diagnosis) if is_new else ""
            if names or text:
                self._name(partial(_is_named, names, text))

    def _name(self, is_named: Callable[[str], bool]) -> None:
        for index, tensors in self._shown.items():
            missing = tensors.add_named(is_named, self.max_tensors)
            if missing and "gradient" in self.of:
                record = self._record("gradient", missing, tag_group(index))
                self._fail_safe.run(self._log, tensors.counted_at, [record])

    def _wanted(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        wanted = {name: p for name, p in parameters.items() if self._patterns.match(name)}
        if self.axis == "value":
            wanted = {name: p for name, p in wanted.items() if not is_sharded(p)}
        return wanted

    def _count_gradients(
        self, wanted: Mapping[str, Tensor], shown: Sequence[str], *, sharded: bool
    ) -> dict[str, Counted]:
        """Return the counts of each gradient by name; of those that are not shown, fewer elements are read."""
        few = None if self.max_samples is None else max(1, self.max_samples // ASIDE)
        if few in (None, self.max_samples) or self.exponents or sharded:
            # Scalars are over all of them; and what is summed over ranks must not hang on what one of them shows.
            parts = {self.max_samples: list(wanted)}
        else:
            chosen = set(shown)
            parts = {few: [name for name in wanted if name not in chosen], self.max_samples: list(shown)}
        counted: dict[str, Counted] = {}
        for most, names in parts.items():
            counts = count(
                [None if (grad := wanted[name].grad) is None else local(grad) for name in names],
                max_samples=most,
                axis=self.axis,
                thresholds=THRESHOLDS if self.exponents else (),
            )
            if names:
                counted |= read_counts({name: wanted[name] for name in names}, counts, sharded=sharded)
        return counted

    @torch.no_grad()
    def _log_update(
        self,
        kept: Mapping[str, Tensor],
        shown: Sequence[str],
        step: int,
        group: str,
        before: list[Samples],
    ) -> None:
        """Write what a step added to the weights, and what they were before it."""
        samples = [a.with_differences(b) for a, b in zip(before, self._sample(kept), strict=True)]
        # Each group has its weights first, then their updates.
        names = iter(kept)
        rows: dict[tuple[str, str], Tensor] = {}
        for group_of_samples in before:
            own = list(islice(names, len(group_of_samples.scale)))
            rows |= {(quantity, name): kept[name] for quantity in ("weight", "update") for name in own}
        counted = read_counts(rows, count_samples(samples, axis=self.axis))
        weights, updates = ({n: counted[quantity, n] for n in shown} for quantity in ("weight", "update"))
        ratios = {n: updates[n].rms / weights[n].rms for n in shown if weights[n].rms > 0}
        records = [
            self._record("update", updates, group),
            update_ratio_record(ratios, group=group),
        ]
        if "weight" in self.of:
            records.append(self._record("weight", weights, group))
        self._log(step, records)

    def _sample(self, parameters: Mapping[str, Tensor]) -> Iterator[Samples]:
        most = None if self.max_samples is None else max(1, self.max_samples // FEWER)
        return sample([local(p.detach()) for p in parameters.values()], max_samples=most)

    def _show_activations(self, step: int) -> None:
        """Show what the modules gave in the newest pass, in one group: it belongs to no optimizer."""
        assert self._probe is not None
        error, self._probe.error = self._probe.error, None
        if error is not None:
            raise error
        found, group = self._probe.take(), tag_group(0)
        if not found:
            return
        rows = {f"{name}\0{i}": c for name, seen in found.items() for i, c in enumerate(seen.calls)}
        calls = [count_samples([c], axis=self.axis) for c in rows.values()]
        shares = [
            torch.full((), math.nan, device=seen.calls[0].values.device) if x is None else x
            for seen in found.values()
            for x in (seen.saturated, seen.dead)
        ]
        device = shares[0].device
        table = torch.cat([table_of(c).to(device) for c in calls])
        numbers = read(torch.cat([table.flatten(), torch.stack([x.to(device) for x in shares])]))
        counted = parse_counts(
            numbers, rows, [c.values.numel() * c.scale[0] for c in rows.values()], table.shape[1]
        )
        merged = {
            name: Counted.merge([counted[f"{name}\0{i}"] for i in range(len(seen.calls))])
            for name, seen in found.items()
        }
        shown = self._modules.choose(list(merged))
        known = [None if math.isnan(x) else x for x in numbers[table.numel() :]]
        pairs = dict(zip(found, zip(known[::2], known[1::2], strict=True), strict=True))
        records = [
            self._record("activation", {name: merged[name] for name in shown}, group),
            activations_record(pairs, step=step, group=group),
        ]
        self._log(step, records)

    def _record(self, quantity: Quantity, counted: Mapping[str, Counted], group: str) -> LogRecord:
        limits = {name: c.limit for name, c in counted.items()} if self.axis == "value" else None
        bins = {name: c.bins for name, c in counted.items()}
        return histogram_record(bins, quantity=quantity, limits=limits, group=group)

    def _log(self, step: int, records: Sequence[LogRecord]) -> None:
        record = merge_records(records)
        for sink in self._sinks:
            sink.write(step, record)

    def _close(self, trainer: Trainer) -> None:
        self._show_named(trainer)
        # The choice stays, for a checkpoint that is saved after the training; model and optimizer go.
        self._restored = self.state_dict()
        for tensors in self._shown.values():
            tensors.close()
        if self._probe is not None:
            self._probe.stop()
        self._shown, self._probe = {}, None
        for sink in self._sinks:
            sink.close()
        self._sinks = []


def _check_quantities(of: object) -> None:
    if isinstance(of, str) or not isinstance(of, Sequence) or not all(isinstance(q, str) for q in of):
        raise TypeError(f'of must be a sequence such as ("gradient", "weight"), got {of!r}')
    odd = [q for q in of if q not in QUANTITIES]
    if odd or not of:
        names = ", ".join(map(repr, QUANTITIES))
        raise ValueError(f"of must hold one or more of {names}, got {of!r}")


@cache
def _given() -> set[str]:
    """Return the notices that were given in this process."""
    return set()


def _first_time(notice: str) -> bool:
    """Return True the first time in a process; remember it."""
    is_first = notice not in _given()
    _given().add(notice)
    return is_first


def _listed(names: Sequence[str], most: int = 3) -> str:
    shown = ", ".join(name or "the whole module" for name in names[:most])
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")


def _is_named(names: Collection[str], text: str, name: str) -> bool:
    return name in names or quote(name) in text
