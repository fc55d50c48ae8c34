"""Scan of the device code's source for host reads; each allowed slow path is listed with its reason."""

import ast
from pathlib import Path

import pytest

import lightning_gradguard

PACKAGE = Path(lightning_gradguard.__file__).parent
DEVICE = sorted(
    str(path.relative_to(PACKAGE))
    for folder in ("stats", "detectors", "clippers")
    for path in (PACKAGE / folder).glob("*.py")
)
DEVICE.append("engine/evaluate.py")
ENGINE = ("parameter_tracker", "graph_observer", "device_skip", "sampling_schedule")
FILES = [*DEVICE, "guard.py", *(f"engine/{name}.py" for name in ENGINE)]

#: Methods that read a tensor's values on the host, or return a tensor whose shape depends on them.
READS = {
    "item",
    "tolist",
    "cpu",
    "numpy",
    "nonzero",
    "argwhere",
    "is_nonzero",
    "unique",
    "masked_select",
    "equal",
}
#: Methods that create a tensor from Python numbers, with a copy to the device that the host waits for.
COPIES = {"new_tensor"}
#: Functions that read on CUDA in older torch, and on XPU, unless they work along a dimension.
MEDIANS = {"median", "nanmedian"}

#: (file, function, operation): why it is allowed.
SLOW = {
    (
        "stats/sharding.py",
        "local_entries",
        "nonzero",
    ): "numbers that are on the host already, once per tensor",
    ("stats/sharding.py", "check_agreement", "tolist"): "once, when a guard is created",
    (
        "stats/sharding.py",
        "largest_over_ranks",
        "tolist",
    ): "after a traversal of the graph, at most eight times",
}

#: Attributes of a tensor that the host knows without reading its values.
_HOST_KNOWN = {
    "shape", "ndim", "dtype", "device", "layout", "grad", "grad_fn", "requires_grad", "is_cuda", "is_meta", "type",
    "numel", "dim", "size", "stride", "element_size", "data_ptr", "is_complex", "is_floating_point", "is_contiguous",
}  # fmt: skip


def fields(files):
    """Return the names of fields and properties that are annotated as tensors wherever they occur."""
    kinds = {}
    for file in files:
        for line in ast.walk(ast.parse((PACKAGE / file).read_text())):
            if isinstance(line, ast.FunctionDef) and any(
                "property" in ast.unparse(d) for d in line.decorator_list
            ):
                kinds.setdefault(line.name, set()).add(ast.unparse(line.returns))
            if isinstance(line, ast.AnnAssign):
                name = getattr(line.target, "id", getattr(line.target, "attr", ""))
                kinds.setdefault(name, set()).add(ast.unparse(line.annotation))
    return frozenset(name for name, tensors in kinds.items() if tensors == {"Tensor"})


ON_DEVICE = fields(DEVICE)
#: Tensor fields that host code also sees; a StepRecord has plain numbers under the same names.
ON_HOST = fields(
    [
        "stats/grad_stats.py",
        "detectors/base.py",
        "clippers/base.py",
        "engine/step_record.py",
        "results.py",
    ]
)


class Reader(ast.NodeVisitor):
    """Visitor that collects host reads per function: by method name, by field, and by how a variable was made."""

    def __init__(self, attributes):
        self.attributes, self.found = attributes, set()
        self.function, self.names = "", set()

    def visit_FunctionDef(self, node):
        outer = self.function, self.names
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        tensors = {a.arg for a in arguments if a.annotation is not None and "Tensor" in _kinds(a.annotation)}
        self.function, self.names = node.name, (self.names - {a.arg for a in arguments}) | tensors
        self.generic_visit(node)
        self.function, self.names = outer

    def visit_Assign(self, node):
        self.generic_visit(node)
        names = [t.id for t in node.targets if isinstance(t, ast.Name)]
        self.names = self.names | set(names) if self.is_tensor(node.value) else self.names - set(names)

    def visit_AnnAssign(self, node):
        self.generic_visit(node)
        if isinstance(node.target, ast.Name) and "Tensor" in _kinds(node.annotation):
            self.names = self.names | {node.target.id}

    def visit_Call(self, node):
        self.generic_visit(node)
        called = node.func
        name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
        if isinstance(called, ast.Attribute) and name in READS | COPIES:
            self._add(name)
        dims = node.args[1:] if ast.unparse(called).startswith("torch.") else node.args
        if isinstance(called, ast.Attribute) and name in MEDIANS and not dims and not node.keywords:
            self._add(name)
        if isinstance(called, ast.Name) and name in {
            "bool",
            "int",
            "float",
            "any",
            "all",
            "max",
            "min",
            "list",
        }:
            self._test(*node.args, how=name)

    def visit_If(self, node):
        self._test(node.test, how="if")
        self.generic_visit(node)

    visit_IfExp = visit_If

    def visit_While(self, node):
        self._test(node.test, how="while")
        self.generic_visit(node)

    def visit_Assert(self, node):
        self._test(node.test, how="assert")
        self.generic_visit(node)

    def visit_BoolOp(self, node):
        self._test(*node.values, how="and" if isinstance(node.op, ast.And) else "or")
        self.generic_visit(node)

    def visit_UnaryOp(self, node):
        if isinstance(node.op, ast.Not):
            self._test(node.operand, how="not")
        self.generic_visit(node)

    def visit_comprehension(self, node):
        self._test(*node.ifs, how="if")
        self.generic_visit(node)

    def is_tensor(self, node):
        """Return True if an expression is a tensor, as far as the source shows."""
        if isinstance(node, ast.Name):
            return node.id in self.names
        if isinstance(node, ast.Attribute):
            return node.attr in self.attributes and not (
                self.is_tensor(node.value) and node.attr in _HOST_KNOWN
            )
        if isinstance(node, ast.Compare):
            compared = not any(isinstance(op, (ast.Is, ast.IsNot, ast.In, ast.NotIn)) for op in node.ops)
            return compared and any(map(self.is_tensor, (node.left, *node.comparators)))
        if isinstance(node, ast.BinOp):
            return self.is_tensor(node.left) or self.is_tensor(node.right)
        if isinstance(node, (ast.UnaryOp, ast.Subscript)):
            inner = node.operand if isinstance(node, ast.UnaryOp) else node.value
            return self.is_tensor(inner) and not isinstance(getattr(node, "op", None), ast.Not)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            return node.func.attr not in _HOST_KNOWN | READS and (
                self.is_tensor(node.func.value) or ast.unparse(node.func) in {"torch.where", "torch.isfinite"}
            )
        return False

    def _test(self, *nodes, how):
        if any(map(self.is_tensor, nodes)):
            self._add(how)

    def _add(self, what):
        self.found.add((self.function, what))


def _kinds(annotation):
    return {part.strip() for part in ast.unparse(annotation).split("|")}


def reads(source, attributes=ON_DEVICE):
    """Return pairs of function and operation."""
    reader = Reader(attributes)
    reader.visit(ast.parse(source))
    return reader.found


def found(file):
    attributes = ON_DEVICE if file in DEVICE else ON_HOST | fields([file])
    return {(file, *pair) for pair in reads((PACKAGE / file).read_text(), attributes)}


@pytest.mark.parametrize("file", FILES)
def test_device_code_reads_nothing_on_the_host(file):
    assert found(file) - SLOW.keys() == set()


def test_listed_slow_paths_exist():
    assert SLOW.keys() - {pair for file in FILES for pair in found(file)} == set()


def test_readback_is_where_reads_happen():
    assert {what for _, what in reads((PACKAGE / "engine/readback.py").read_text())} == {"cpu", "tolist"}


def test_tensor_fields_are_found():
    assert {"norms", "finite", "raised", "total", "seen"} <= ON_DEVICE
    assert {"present", "lost", "total"} <= ON_HOST
    assert ON_HOST.isdisjoint({"finite", "seen"})
    assert fields(["engine/parameter_tracker.py"]) >= {"weights", "updates", "_moved"}


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("x.item()", "item"),
        ("stats.norms.tolist()", "tolist"),
        ("x.detach().cpu().numpy()", "cpu"),
        ("bool(x)", "bool"),
        ("float(x + 1)", "float"),
        ("int(stats.norms.sum())", "int"),
        ("any(stats.norms > 0)", "any"),
        ("y = 1 if x > 0 else 2", "if"),
        ("assert stats.finite", "assert"),
        ("y = x.sum() > 3\n    while y: pass", "while"),
        ("return maybe is None or maybe > 0", "or"),
        ("return other and not stats.finite", "not"),
        ("return [z for z in other if x[0]]", "if"),
        ("y: Tensor = other()\n    if ~y: pass", "if"),
        ("torch.nanmedian(x)", "nanmedian"),
        ("x.new_tensor(1.0)", "new_tensor"),
    ],
)
def test_scanner_finds_reads(line, what):
    assert ("f", what) in reads(f"def f(x: Tensor, stats, maybe: Tensor | None, other):\n    {line}\n")


@pytest.mark.parametrize(
    "line",
    [
        "if maybe is None: pass",
        "if x.numel() and x.dtype == other: pass",
        "y = [g for g in other if (h := g) is not None]",
        "torch.nanmedian(x, 0).values",
        "x.nanmedian(dim=0)",
        "x = other()\n    if x: pass",
        "if x.shape[0] > 3 or len(x): pass",
    ],
)
def test_scanner_ignores_metadata(line):
    assert reads(f"def f(x: Tensor, stats, maybe: Tensor | None, other):\n    {line}\n") == set()
