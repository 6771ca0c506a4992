"""Prediction: ELF files and modules of this host, judged by its own loader and parser."""

from __future__ import annotations

import ast
import random
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from imagecache.errors import Rejected
from imagecache.profile.predict import linker, python
from imagecache.profile.predict.elf import Elf, read_elf

PYTHON = Path(sys.executable).resolve()


def parse(content: bytes) -> Elf:
    steps = read_elf()
    try:
        offset, length = next(steps)
        while True:
            offset, length = steps.send(content[offset : offset + length])
    except StopIteration as end:
        return end.value


def closure(program: Path) -> set[str]:
    """What our rules find that a program loads, on this host's own root."""
    configured = linker.configured_directories(
        [path.read_bytes() for path in Path("/etc/ld.so.conf.d").glob("*.conf")]
    )
    found: set[str] = set()
    level = [program]
    while level:
        path = level.pop()
        elf = parse(path.read_bytes())
        for name in elf.needed:
            inside = str(path).encode().lstrip(b"/")
            for candidate in linker.candidates(
                name, elf, inside, environment=(), configured=configured
            ):
                real = Path("/" + candidate.decode()).resolve()
                if real.is_file():
                    if str(real) not in found:
                        found.add(str(real))
                        level.append(real)
                    break
    return found


@pytest.mark.parametrize("program", ["/bin/bash", str(PYTHON), "/usr/bin/skopeo", "/usr/bin/git"])
def test_libraries_are_those_that_the_loader_finds(program: str) -> None:
    """ld.so --list is the judge."""
    real = Path(program).resolve()
    loader = parse(real.read_bytes()).interpreter.decode()
    listed = subprocess.run([loader, "--list", str(real)], capture_output=True, text=True)
    judged = {str(Path(x).resolve()) for x in re.findall(r"=> (/\S+)", listed.stdout)}
    assert judged
    assert closure(real) >= judged


@pytest.mark.quick
def test_a_static_program_and_no_program_at_all() -> None:
    busybox = parse(Path("/bin/busybox").read_bytes()) if Path("/bin/busybox").exists() else None
    if busybox is not None and not busybox.interpreter:
        assert busybox.needed == ()
    for content in (b"", b"#!/bin/sh\n", b"\x7fELF" + bytes(60), b"\x7fELF\x02\x01" + bytes(10)):
        with pytest.raises(Rejected):
            parse(content)


@pytest.mark.quick
def test_a_damaged_elf_file_is_refused_or_read_within_the_caps() -> None:
    """Flips in headers, dynamic section and strings: no other error, no huge request."""
    content = bytearray(PYTHON.read_bytes())
    rng = random.Random(7)
    for _ in range(3000):
        damaged = bytearray(content[:4096])
        for _ in range(rng.randint(1, 6)):
            damaged[rng.randrange(0, 1024)] = rng.randrange(256)
        whole = bytes(damaged)
        steps = read_elf()
        try:
            offset, length = next(steps)
            while True:
                assert length <= 1 << 20
                offset, length = steps.send(whole[offset : offset + length])
        except (StopIteration, Rejected):
            pass


def top_level_imports(source: bytes) -> set[str]:
    """By the parser: modules that are imported outside of functions."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                continue
            if isinstance(child, ast.Import):
                found.update(alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                found.add("." * child.level + (child.module or ""))
            visit(child)

    visit(ast.parse(source))
    return found


def test_imports_are_those_that_the_parser_finds() -> None:
    """All modules of the standard library: none of their top-level imports is missed."""
    missed: dict[str, set[str]] = {}
    total = 0
    stdlib = Path(sysconfig.get_path("stdlib"))
    for path in sorted(stdlib.rglob("*.py")):
        if "test" in path.parts or "site-packages" in path.parts or "lib2to3" in path.parts:
            continue
        source = path.read_bytes()
        try:
            wanted = top_level_imports(source)
        except (SyntaxError, ValueError):
            continue
        found = {"." * item.level + item.module.decode() for item in python.imports_of(source)}
        total += len(wanted)
        if wanted - found:
            missed[str(path)] = wanted - found
    assert total > 1000
    assert sum(map(len, missed.values())) <= total // 100, missed


@pytest.mark.quick
def test_imports_inside_functions_do_not_count() -> None:
    source = b"import os\ndef f():\n    import late\n    from x import y\nfrom . import near\n"
    assert [item.module for item in python.imports_of(source)] == [b"os", b""]


@pytest.mark.quick
def test_relative_imports_count_from_their_package() -> None:
    item = python.Import(b"core", 1, (b"array",))
    assert list(python.absolute(item, b"numpy")) == [
        b"numpy",
        b"numpy.core",
        b"numpy.core.array",
    ]
    assert list(python.absolute(python.Import(b"x", 9, ()), b"numpy")) == []


@pytest.mark.quick
def test_origin_and_runpath_come_before_the_defaults() -> None:
    elf = Elf(64, 62, b"", (b"liba.so",), (b"$ORIGIN/../libs",), (), ())
    found = list(
        linker.candidates(
            b"liba.so", elf, b"opt/app/bin/x", environment=(b"/env",), configured=(b"conf",)
        )
    )
    assert found[:3] == [b"env/liba.so", b"opt/app/libs/liba.so", b"conf/liba.so"]
    assert b"usr/lib/x86_64-linux-gnu/liba.so" in found


@pytest.mark.quick
def test_byte_code_of_another_time_or_size_means_reading_the_source() -> None:
    """py_compile is the judge of the header."""
    import py_compile
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "m.py"
        source.write_text("x = 1\n")
        head = Path(py_compile.compile(str(source))).read_bytes()[:16]
        modified, size = int(source.stat().st_mtime), source.stat().st_size
    assert python.is_current(head, modified, size)
    assert not python.is_current(head, modified + 1, size)
    assert not python.is_current(head, modified, size + 1)
    assert not python.is_current(head[:10], modified, size)
