"""Our TensorRT code against the published bindings: what it names must exist, and be called as it is declared.

TensorRT's libraries cannot be had everywhere, its Python bindings can. They load once small libraries stand in for
TensorRT's; those are compiled here from the list of symbols that the bindings miss.
"""

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

import ubgen

RELEASES = {
    "oldest 10": "tensorrt-cu12-bindings==10.12.*",
    "newest 10": "tensorrt-cu13-bindings>=10.13,<11",
    "newest 11": "tensorrt-cu13-bindings>=11,<12",
}
SOURCES = {
    path: path.read_text(encoding="utf-8")
    for path in sorted(Path(ubgen.__file__).parent.rglob("*.py"))
    if "import tensorrt as trt" in path.read_text(encoding="utf-8")
}
CORE = {  # a checker that lost track of the objects would see none of these
    "Builder.build_serialized_network",
    "BuilderFlag.REFIT",
    "IBuilderConfig.set_timing_cache",
    "ICudaEngine.get_tensor_profile_shape",
    "ICudaEngine.serialize_with_config",
    "IExecutionContext.execute_async_v3",
    "IExecutionContext.set_tensor_address",
    "ILogger.log",
    "IOptimizationProfile.set_shape",
    "IProgressMonitor.step_complete",
    "OnnxParser.parse_from_file",
    "OnnxParserRefitter.refit_from_file",
    "ParserError.desc",
    "Refitter.refit_cuda_engine",
    "Runtime.deserialize_cuda_engine",
}
Api = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""Class name ("" for the module) -> member -> {kind, doc, settable}."""


class Uses:
    """Follows TensorRT's objects through source code, by annotations and by what the bindings say a call returns.

    Types are "trt" for the module, "class X", "call X.f", and "X" for an object of class X; None is anything else.
    """

    def __init__(self, api: Api, sources: Mapping[Any, str]) -> None:
        self.api = api
        self.seen: set[str] = set()
        self.problems: list[str] = []
        self.returns: dict[str, str] = {}
        self._optional: set[tuple[str, str]] = set()
        trees = {path: ast.parse(text) for path, text in sources.items()}
        for tree in trees.values():
            for node in ast.walk(tree):
                if isinstance(node, ast.FunctionDef) and (type_ := self._annotated(node.returns)):
                    self.returns[node.name] = type_
        for path, tree in trees.items():
            self._path = path
            self._body(tree.body, {"trt": "trt"})
            self._names(tree)

    def _names(self, tree: ast.AST) -> None:
        """Those in annotations and base classes too."""
        guarded = {
            guard for node in ast.walk(tree) if isinstance(node, ast.Call) and (guard := _hasattr(node))
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and (ast.unparse(node.value), node.attr) not in guarded:
                self._type(node, {"trt": "trt"})

    def _annotated(self, node: ast.expr | None) -> str | None:
        """The class that `trt.X` or `trt.X.Y` names in an annotation."""
        name = ast.unparse(node).removeprefix("trt.") if node else ""
        return name if node and ast.unparse(node).startswith("trt.") and name in self.api else None

    def _body(self, body: list[ast.stmt], env: dict[str, str | None]) -> None:
        for statement in body:
            self._statement(statement, env)

    def _statement(self, node: ast.AST, env: dict[str, str | None]) -> None:
        if isinstance(node, ast.FunctionDef):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            self._body(node.body, {**env, **{a.arg: self._annotated(a.annotation) for a in arguments}})
        elif isinstance(node, ast.ClassDef):
            self._class(node, env)
        elif isinstance(node, ast.If) and (guard := _hasattr(node.test)):
            self._optional.add(guard)
            self._body(node.body, env)
            self._optional.discard(guard)
            self._body(node.orelse, env)
        elif isinstance(node, ast.Assign | ast.AnnAssign | ast.NamedExpr):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            annotation = node.annotation if isinstance(node, ast.AnnAssign) else None
            type_ = self._type(node.value, env) if node.value else None
            for target in targets:
                self._assign(target, self._annotated(annotation) or type_, env)
        elif isinstance(node, ast.expr) and not isinstance(node, ast.Name):
            self._type(node, env)
        else:
            for child in ast.iter_child_nodes(node):
                self._statement(child, env)

    def _class(self, node: ast.ClassDef, env: dict[str, str | None]) -> None:
        methods = [part for part in node.body if isinstance(part, ast.FunctionDef)]
        for base in [self._annotated(base) for base in node.bases]:
            for method in methods if base else []:
                if not method.name.startswith("_"):
                    self._override(str(base), method)
        for method in sorted(methods, key=lambda method: method.name != "__init__"):
            # one table for the class: what __init__ puts on self is known in the other methods
            inner = env if method.name == "__init__" else dict(env)
            self._statement(method, inner)
            if method.name == "__init__":
                env = {**env, **self._attributes(method, env)}

    def _attributes(self, method: ast.FunctionDef, env: dict[str, str | None]) -> dict[str, str | None]:
        local = {**env, **{a.arg: self._annotated(a.annotation) for a in method.args.args}}
        self._body(method.body, local)
        return {name: type_ for name, type_ in local.items() if name.startswith("self.")}

    def _override(self, base: str, method: ast.FunctionDef) -> None:
        """What TensorRT calls must be what TensorRT knows, with as many parameters."""
        ours = len(method.args.args)
        declared = [len(s) for s in self._signatures(f"{base}.{method.name}")]
        self.seen.add(f"{base}.{method.name}")
        if ours not in declared:
            self._problem(method, f"{base}.{method.name} does not take {ours} parameters")

    def _assign(self, target: ast.expr, type_: str | None, env: dict[str, str | None]) -> None:
        if isinstance(target, ast.Attribute):
            owner = self._type(target.value, env)
            if owner in self.api:
                member = self.api[owner].get(target.attr, {})
                self.seen.add(f"{owner}.{target.attr}")
                if not member.get("settable"):
                    self._problem(target, f"{owner}.{target.attr} cannot be set")
        if isinstance(target, ast.Name | ast.Attribute):
            env[ast.unparse(target)] = type_

    def _type(self, node: ast.expr, env: dict[str, str | None]) -> str | None:
        if ast.unparse(node) in env:
            return env[ast.unparse(node)]
        if isinstance(node, ast.Attribute):
            return self._member(node, self._type(node.value, env))
        if isinstance(node, ast.Call):
            for argument in [*node.args, *(keyword.value for keyword in node.keywords)]:
                self._type(argument, env)
            return self._call(node, self._type(node.func, env))
        if isinstance(node, ast.NamedExpr):
            self._statement(node, env)
            return env[ast.unparse(node.target)]
        for child in ast.iter_child_nodes(node):
            self._statement(child, env)
        return None

    def _member(self, node: ast.Attribute, owner: str | None) -> str | None:
        if owner is None:
            return None
        name = "" if owner == "trt" else owner.removeprefix("class ")
        if name not in self.api:
            return None
        path = f"{name}.{node.attr}".lstrip(".")
        self.seen.add(path)
        member = self.api[name].get(node.attr)
        if member is None:
            if (ast.unparse(node.value), node.attr) not in self._optional:
                self._problem(node, f"{path} does not exist")
            return None
        if member["kind"] == "class":
            return f"class {path}"
        if member["kind"] == "function":
            return f"call {path}"
        return _returned(member["doc"]) if member["kind"] == "property" else name or None

    def _call(self, node: ast.Call, target: str | None) -> str | None:
        if target is None:
            return self.returns.get(ast.unparse(node.func).rpartition(".")[2])
        kind, _, path = target.partition(" ")
        if kind not in ("class", "call") or any(isinstance(a, ast.Starred) for a in node.args):
            return None
        function = f"{path}.__init__" if kind == "class" else path
        owner = path.rpartition(".")[0] or (path if kind == "class" else "")
        # trt.X.__init__(self) names self, x.method() and trt.X() do not, and trt.function() has none
        given = len(node.args) + (bool(owner) and not (kind == "call" and path.endswith(".__init__")))
        signatures = self._signatures(function)
        names = {keyword.arg for keyword in node.keywords}
        if signatures and not any(_fits(s, given, names) for s in signatures):
            self._problem(node, f"{function} is not called as it is declared: {ast.unparse(node)}")
        return path if kind == "class" else _returned(self._doc(function))

    def _doc(self, path: str) -> str:
        owner, _, name = path.rpartition(".")
        return self.api.get(owner, {}).get(name, {}).get("doc", "")

    def _signatures(self, path: str) -> list[list[tuple[str, bool]]]:
        """Parameters of each overload: (name, whether it has a default)."""
        name = path.rpartition(".")[2]
        declared = re.findall(rf"^(?:\d+\. )?{name}\((.*)\) ->", self._doc(path), re.MULTILINE)
        return [
            [_parameter(p) for p in _split(parameters)] for parameters in declared if parameters[:1] != "*"
        ]

    def _problem(self, node: ast.AST, text: str) -> None:
        problem = f"{self._path}:{getattr(node, 'lineno', 0)}: {text}"
        if problem not in self.problems:
            self.problems.append(problem)


def _hasattr(test: ast.expr) -> tuple[str, str] | None:
    if isinstance(test, ast.Call) and ast.unparse(test.func) == "hasattr":
        return ast.unparse(test.args[0]), ast.literal_eval(test.args[1])
    return None


def _split(parameters: str) -> Iterator[str]:
    """At the commas outside of all brackets."""
    depth, start = 0, 0
    for i, character in enumerate(parameters):
        depth += (character in "([{<") - (character in ")]}>")
        if character == "," and depth == 0:
            yield parameters[start:i]
            start = i + 1
    if parameters[start:].strip():
        yield parameters[start:]


def _parameter(text: str) -> tuple[str, bool]:
    return text.split(":")[0].split("=")[0].strip(), "=" in text


def _fits(signature: list[tuple[str, bool]], given: int, names: set[str | None]) -> bool:
    """Whether a call of `given` positional arguments (self among them) and these keywords can be made."""
    missing = [name for name, optional in signature[given:] if not optional]
    return given <= len(signature) and names <= {n for n, _ in signature[given:]} and set(missing) <= names


def _returned(doc: str) -> str | None:
    """The TensorRT class that a docstring says a call returns."""
    found = re.search(r"-> (?:tensorrt_bindings\.)?tensorrt(?:_bindings)?\.([\w.]+)", doc)
    return found[1] if found else None


@pytest.fixture(scope="session", params=list(RELEASES))
def release(request: pytest.FixtureRequest, bindings: Any) -> Any:
    """(directory of the bindings, environment in which they load)."""
    return bindings(RELEASES[request.param])


@pytest.fixture(scope="session")
def api(release: Any) -> Api:
    directory, environment = release
    command = [sys.executable, str(Path(__file__).with_name("describe_bindings.py")), str(directory)]
    answer = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(answer.stdout)


def test_everything_named_exists_and_is_called_as_declared(api: Api) -> None:
    uses = Uses(api, SOURCES)
    assert uses.problems == []
    assert uses.seen >= CORE, sorted(CORE - uses.seen)


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        (
            "def f(c: trt.IBuilderConfig):\n c.set_flag(trt.BuilderFlag.NO_SUCH)",
            "BuilderFlag.NO_SUCH does not",
        ),
        ("def f(c: trt.IBuilderConfig):\n c.set_flag()", "set_flag is not called as it is declared"),
        ("def f(c: trt.IBuilderConfig):\n c.set_flags(1)", "IBuilderConfig.set_flags does not exist"),
        ("def f(c: trt.IBuilderConfig):\n c.workspace = 1", "IBuilderConfig.workspace cannot be set"),
        ("def f(e: trt.ICudaEngine):\n e.num_io_tensors = 1", "ICudaEngine.num_io_tensors cannot be set"),
        ("b = trt.Builder()", "Builder.__init__ is not called"),
        ("def f(c: trt.INothing): ...", "INothing does not exist"),
        ("if hasattr(trt.Nothing, 'A'):\n pass", "Nothing does not exist"),
        (
            "b = trt.Builder(LOG)\nc = b.create_builder_config()\nc.get_timing_cache(1)",
            "get_timing_cache is not",
        ),
        ("p = trt.OnnxParser(network=1, log=2)", "OnnxParser.__init__ is not called"),
        ("class A(trt.ILogger):\n def log(self, text): ...", "ILogger.log does not take 2 parameters"),
        ("class A(trt.ILogger):\n def logs(self, a, b): ...", "ILogger.logs does not take 3 parameters"),
        (
            "class A:\n def __init__(self, e: trt.ICudaEngine):\n  self.e = e\n"
            " def g(self):\n  self.e.create_execution_context().execute_async_v2(1)",
            "IExecutionContext.execute_async_v2 does not exist",
        ),
        (
            "def g() -> trt.ICudaEngine: ...\nif x is None or (e := g()).nothing:\n pass",
            "ICudaEngine.nothing",
        ),
    ],
)
def test_the_check_finds(api: Api, code: str, problem: str) -> None:
    problems = Uses(api, {"code": code}).problems
    assert len(problems) == 1, problems
    assert problem in problems[0]


@pytest.mark.parametrize(
    "code",
    [
        "if hasattr(trt.BuilderFlag, 'NO_SUCH'):\n f(trt.BuilderFlag.NO_SUCH)",
        "def f(e: trt.ICudaEngine):\n e.create_execution_context(strategy=1).execute_async_v3(stream_handle=2)",
        "trt.Runtime(LOG).deserialize_cuda_engine(b'').get_tensor_name(0)",
        "class A(trt.ILogger):\n def __init__(self):\n  trt.ILogger.__init__(self)\n def log(self, a, b): ...",
    ],
)
def test_the_check_passes(api: Api, code: str) -> None:
    assert Uses(api, {"code": code}).problems == []


NO_GPU = """
import sys, pathlib, warnings, tensorrt_bindings
sys.modules["tensorrt"] = tensorrt_bindings
import tensorrt as trt
from ubgen.core.errors import UserError
from ubgen.export.compilers.tensorrt import Progress, build, refit
from ubgen.runtime import tensorrt as runtime
from ubgen.runtime.tensorrt import LOG, open_plan, why
LOG.log(trt.ILogger.Severity.WARNING, "of a build")
LOG.log(trt.ILogger.Severity.ERROR, "no device\\n found")
print(why(), why() == "")
progress = Progress("unet", print)
progress.phase_start("Building", None, 3)
progress.phase_start("Timing", "Building", 3)
print(progress.step_complete("Building", 0), progress.phase_finish("Building"))
progress.interrupted = True
print(progress.step_complete("Building", 1))
plan = pathlib.Path("unet.plan")
plan.write_bytes(b"")
for call in (lambda: open_plan(plan), lambda: refit(plan, plan, plan),
             lambda: build(plan, None, None, "cuda", print, plan)):
    try:
        call()
    except UserError as error:
        print(error)

class Runtime:
    def deserialize_cuda_engine(self, plan):
        LOG.log(trt.ILogger.Severity.INFO, "loaded")
        LOG.log(trt.ILogger.Severity.WARNING, "built on another\\n GPU model")
        return plan

runtime._runtime = Runtime
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    open_plan(plan)
print([str(warning.message) for warning in caught])
"""


@pytest.mark.parametrize("release", ["newest 10", "newest 11"], indirect=True)
def test_our_classes_load_and_the_lack_of_a_gpu_is_said_in_one_line(release: Any, tmp_path: Path) -> None:
    """With the real bindings, whose libraries here answer with null pointers as they do where there is no GPU."""
    _, environment = release
    answer = subprocess.run(
        [sys.executable, "-c", NO_GPU],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.stdout.splitlines() == [
        ": no device found True",
        "unet: Building",
        "True None",
        "False",
        "TensorRT does not start on this machine",
        "TensorRT does not start on this machine",
        "TensorRT cannot build on this machine",
        "['unet.plan: TensorRT warns: built on another GPU model']",
    ], answer.stderr
