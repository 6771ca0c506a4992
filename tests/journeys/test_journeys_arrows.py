"""The house rules that a machine can keep: import arrows, pure modules, file lengths."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("nbdserver", "imagecache", "preload", "cube")

# Who may import which of our packages: (importer's prefix, what it may import). First match counts.
ARROWS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("nbdserver", ("nbdserver",)),
    # preload's jobs: the queue, the table that it survives in, and what a dry run plans
    (
        "imagecache.daemon",
        ("imagecache", "nbdserver", "preload.jobs", "preload.jobtable", "preload.planning"),
    ),
    ("imagecache.cache.device", ("imagecache", "nbdserver")),
    ("imagecache", ("imagecache",)),
    ("preload", ("preload", "imagecache")),
    # session: the context object that every command of the CLI is given
    (
        "cube",
        ("cube", "preload.client", "nbdserver.attach", "imagecache.errors", "imagecache.session"),
    ),
)

# Pure modules do no I/O: bytes in, a plan out.
PURE = (
    "nbdserver.protocol",
    "imagecache.flatten",
    "imagecache.faces",
    "imagecache.chunks",
    "imagecache.packs",
    "imagecache.blockimage",
)
IMPURE_EXCEPTIONS = ("imagecache.flatten.worker",)
IO_MODULES = frozenset(
    "aiohttp asyncio boto3 botocore click concurrent fcntl glob http logging mmap multiprocessing"
    " oras os pathlib random requests selectors shutil signal socket sqlite3 sqlite_utils ssl"
    " subprocess tempfile threading time urllib uuid".split()
)
MAX_LINES = 600


def modules() -> Iterator[tuple[str, Path]]:
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def imports(module: str, path: Path) -> Iterator[tuple[str, int]]:
    """Each imported name in full, with its line; `from a import b` yields `a.b`."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_bytes(), str(path))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, *([base] if base else [])])
            yield from ((f"{base}.{alias.name}", node.lineno) for alias in node.names)


def below(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def allowed_for(module: str) -> tuple[str, ...]:
    return next(allowed for prefix, allowed in ARROWS if below(module, prefix))


@pytest.mark.quick
def test_imports_follow_the_arrows() -> None:
    wrong = []
    for module, path in modules():
        allowed = allowed_for(module)
        for name, line in imports(module, path):
            ours = name.split(".")[0] in PACKAGES
            if ours and not any(below(name, prefix) for prefix in allowed):
                wrong.append(f"{path.relative_to(ROOT)}:{line}: {module} must not import {name}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.quick
def test_nbdserver_needs_the_standard_library_only() -> None:
    wrong = []
    for module, path in modules():
        if not below(module, "nbdserver"):
            continue
        for name, line in imports(module, path):
            top = name.split(".")[0]
            if top != "nbdserver" and top not in sys.stdlib_module_names:
                wrong.append(f"{path.relative_to(ROOT)}:{line}: {name}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.quick
def test_pure_modules_do_no_input_or_output() -> None:
    wrong = []
    for module, path in modules():
        if not any(below(module, p) for p in PURE) or module in IMPURE_EXCEPTIONS:
            continue
        wrong += [
            f"{path.relative_to(ROOT)}:{line}: pure module imports {name}"
            for name, line in imports(module, path)
            if name.split(".")[0] in IO_MODULES
        ]
        wrong += [
            f"{path.relative_to(ROOT)}:{node.lineno}: pure module has {kind}"
            for node in ast.walk(ast.parse(path.read_bytes()))
            for kind in [impurity(node)]
            if kind
        ]
    assert not wrong, "\n".join(wrong)


def impurity(node: ast.AST) -> str | None:
    if isinstance(node, ast.AsyncFunctionDef | ast.Await):
        return "async code"
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        return "open() or print()" if node.func.id in ("open", "print") else None
    return None


@pytest.mark.quick
def test_no_package_imports_tests_tools_or_benchmarks() -> None:
    strangers = {"tests", "tools", "benchmarks", "kits", "imagemaker", "testbed"}
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for module, path in modules()
        for name, line in imports(module, path)
        if name.split(".")[0] in strangers
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.quick
def test_no_file_is_too_long() -> None:
    folders = [ROOT / name for name in (*PACKAGES, "tests", "tools", "benchmarks")]
    long = []
    for path in (path for folder in folders for path in sorted(folder.rglob("*"))):
        source = path.suffix in (".py", ".c", ".h", ".sh") or path.parent.name == "tools"
        if not path.is_file() or not source or "__pycache__" in path.parts:
            continue
        lines = path.read_bytes().count(b"\n")
        if lines > MAX_LINES:
            long.append(f"{path.relative_to(ROOT)} has {lines} lines")
    assert not long, "\n".join(long)


@pytest.mark.quick
@pytest.mark.parametrize("package", PACKAGES)
def test_each_package_says_what_it_is(package: str) -> None:
    tree = ast.parse((ROOT / package / "__init__.py").read_bytes())
    docstring = ast.get_docstring(tree) or ""
    assert len(docstring.splitlines()) >= 3, f"{package} says too little about itself"
