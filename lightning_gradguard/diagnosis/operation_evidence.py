"""Say what was special about an operation that made NaN or Inf."""

from __future__ import annotations

from lightning_gradguard.diagnosis.operation_domains import CLOSED, DOMAINS
from lightning_gradguard.diagnosis.wording import count, number, quote
from lightning_gradguard.introspection.operation_facts import ArgumentFacts, Condition, OperationFacts


def is_opaque(node: str) -> bool:
    """Return True for a node that hides the operations that it runs."""
    return node.startswith(("CompiledFunction", "CheckpointFunction", "DifferentiableGraph"))


def explain(facts: OperationFacts) -> str:
    """Return what was special about an operation's arguments, in one clause; empty if nothing was."""
    n, condition = facts.count, next(iter(facts.conditions), None)
    match condition:
        case Condition.ONE_ELEMENT:
            return "the unbiased spread of a single element is 0 / 0"
        case Condition.EMPTY:
            return "the mean over no element is 0 / 0"
        case Condition.ALL_IGNORED:
            index = facts.setting("ignore_index") or "-100"
            return (
                f"all {count(n, 'label')} are ignored (ignore_index={index}), and the mean over none is 0 / 0"
            )
        case Condition.ZERO_WEIGHT:
            return f"the class weights of {count(n, 'label')} sum to 0, and the loss is divided by this sum"
        case Condition.HIDDEN_TARGET:
            return f"a mask of -Inf hides the class that is the target, in {count(n, 'row')}"
        case Condition.TOO_LONG:
            return (
                f"{count(n, 'target is', 'targets are')} longer than the input, so no alignment is possible"
            )
        case Condition.HIDDEN_ROW:
            return f"a mask hides every entry of {count(n, 'row')}"
        case Condition.ZERO_VECTOR:
            names = facts.arguments[0].parameters if facts.arguments else ()
            what = f" of {quote(names[0])}" if names else ""
            return f"the norm{what} is 0 in {count(n, 'row')}, and 0 over its norm is 0 / 0"
        case Condition.REPEATED_VALUES:
            values = "singular values" if facts.function == "svd" else "eigenvalues"
            matrices = count(n, "matrix has", "matrices have")
            return f"{matrices} repeated {values}, and the slope contains 1 over their difference"
    return _explain_values(facts)


def _explain_values(facts: OperationFacts) -> str:
    if facts.unselected and facts.chooser:
        return f"its slope is infinite only where `torch.{facts.chooser}` leaves the result out, but 0 * Inf is NaN"
    argument = critical_argument(facts)
    if argument is None:
        return ""
    name = argument.name or next(iter(argument.parameters), "")
    whose = f" of {quote(name)}" if name else " of its argument"
    if facts.function in DOMAINS and DOMAINS[facts.function].high is not None:
        return f"its argument goes from {number(argument.low)} to {number(argument.high)}"
    if argument.zeros:
        return f"{count(argument.zeros, 'element')}{whose} {'is' if argument.zeros == 1 else 'are'} 0"
    if argument.negatives:
        return f"{count(argument.negatives, 'element')}{whose} {'is' if argument.negatives == 1 else 'are'} below 0"
    return ""


def critical_argument(facts: OperationFacts) -> ArgumentFacts | None:
    """Return the argument on which it depends that the result is finite."""
    if facts.function in CLOSED or not facts.arguments:
        return None
    role = (
        "1"
        if facts.function == "div"
        else DOMAINS[facts.function].argument
        if facts.function in DOMAINS
        else "0"
    )
    return next((argument for argument in facts.arguments if argument.role == role), None)


def is_initial(facts: OperationFacts | None) -> bool:
    """Return True if a parameter by itself makes the argument zero, so that its first value is wrong."""
    if facts is None:
        return False
    if Condition.ZERO_VECTOR in facts.conditions:
        return True
    argument = critical_argument(facts)
    return argument is not None and bool(argument.parameters) and bool(argument.zeros or argument.negatives)
