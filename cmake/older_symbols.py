"""Make libraries to link with, in whose place older ones may stand when the result runs.

usage: python older_symbols.py FOLDER [COMPILER]

A linker binds a name to its newest version in the library that it finds, and the result then refuses to load where that
version is missing. The stand-ins have the names of this machine's libraries, each in the newest version that
manylinux_2_28 (glibc 2.28, libstdc++ of GCC 8) has, and no code. What libstdc++ got later comes from the static one,
and what the C library got later is an error of the linker, but for the few names in LATER.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

# The policy manylinux_2_28 of auditwheel.
NEWEST = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11), "GCC": (7, 0, 0)}
LIBRARIES = ("libc.so.6", "libm.so.6", "libgcc_s.so.1", "libstdc++.so.6")
# The C library took these in with 2.34, under the versions that they had there too.
MERGED = {"libdl.so.2": r"dl", "libpthread.so.0": r"pthread_|sem_", "librt.so.1": r"shm_|timer_|mq_|aio_|lio_"}
# Whether the process has one thread only, which spares libstdc++ an atomic instruction: never known here.
LATER = "char __libc_single_threaded = 0;\n"

# By type of a name: the section that it is put into, and its type in assembler.
SECTIONS = {"FUNC": (".text", "function"), "IFUNC": (".text", "function"), "TLS": ('.tbss,"awT",@nobits', "tls_object")}

Version = tuple[int, ...]


def versioned(library: str) -> Iterator[tuple[str, str, str, bool]]:
    """Yield name, type and version of what a library defines, and whether the version is the default one."""
    printed = subprocess.run(["readelf", "--dyn-syms", "-W", library], capture_output=True, text=True, check=True)
    for line in printed.stdout.splitlines():
        found = re.match(
            r"\s*\d+: \S+\s+\S+ (\w+)\s+(?:GLOBAL|WEAK|UNIQUE)\s+\w+\s+(?!UND|ABS)\S+ (\S+?)(@@?)(\S+)", line
        )
        if found:
            yield found[2], found[1], found[4], found[3] == "@@"


def read(version: str) -> tuple[str, Version] | None:
    """Split ``GLIBC_2.28`` into its name and its numbers; None for private versions and other names."""
    found = re.fullmatch(r"([A-Z]+)_([\d.]+)", version)
    if found is None or found[1] not in NEWEST:
        return None
    return found[1], tuple(int(part) for part in found[2].split("."))


def newest_allowed(library: str) -> dict[str, tuple[str, str, bool]]:
    """Return, by name, type and newest allowed version of what a library defines, and whether a later one is there."""
    chosen: dict[str, tuple[Version, str, str]] = {}
    later: set[str] = set()
    for name, kind, version, _ in versioned(library):
        parts = read(version)
        if parts is None:
            continue
        if parts[1] > NEWEST[parts[0]]:
            later.add(name)
        elif name not in chosen or chosen[name][0] < parts[1]:
            chosen[name] = (parts[1], kind, version)
    return {name: (kind, version, name in later) for name, (_, kind, version) in chosen.items()}


def stand_in(compiler: str, folder: Path, soname: str, names: dict[str, tuple[str, str, bool]]) -> None:
    """Link a library of that name that has the names and no code."""
    source = []
    nodes: dict[str, list[str]] = {}
    for name, (kind, version, _) in sorted(names.items()):
        section, sort = SECTIONS.get(kind, (".data", "object"))
        source += [f".section {section}", f'.globl "{name}"', f'.type "{name}", %{sort}', f'"{name}":', ".skip 8"]
        nodes.setdefault(version, []).append(name)
    source += ['.section .note.GNU-stack,"",%progbits']
    (folder / f"{soname}.s").write_text("\n".join(source) + "\n")
    script = "".join(
        f"{node} {{ {' '.join(f'{chr(34)}{name}{chr(34)};' for name in names)} }};\n" for node, names in nodes.items()
    )
    (folder / f"{soname}.map").write_text(script)
    subprocess.run(
        [
            *(compiler, "-shared", "-nostdlib", "-o", folder / soname, folder / f"{soname}.s"),
            *(f"-Wl,-soname,{soname}", f"-Wl,--version-script,{folder / soname}.map"),
        ],
        check=True,
    )


def found_by(compiler: str, name: str) -> str:
    """Return where the compiler finds a library."""
    asked = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    path = asked.stdout.strip()
    if not Path(path).is_absolute():
        sys.exit(f"starflow-ext: {compiler} finds no {name}, which a wheel for older systems links with.")
    return path


def main(folder: Path, compiler: str) -> None:
    """Fill the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    libc: dict[str, tuple[str, str, bool]] = {}
    for soname in LIBRARIES:
        names = newest_allowed(found_by(compiler, soname))
        if soname == "libc.so.6":
            libc = names
            moved = {
                other: {name: libc[name] for name in libc if libc[name][2] and re.match(pattern, name)}
                for other, pattern in MERGED.items()
            }
            names = {name: value for name, value in libc.items() if not any(name in some for some in moved.values())}
            for other, some in moved.items():
                stand_in(compiler, folder, other, some)
        stand_in(compiler, folder, soname, names)
    (folder / "later.c").write_text(LATER)
    subprocess.run(
        [
            compiler,
            "-x",
            "c",
            "-O2",
            "-fPIC",
            "-fvisibility=hidden",
            "-c",
            folder / "later.c",
            "-o",
            folder / "later.o",
        ],
        check=True,
    )
    subprocess.run(["ar", "rcs", folder / "liblater.a", folder / "later.o"], check=True)
    # The names that the linker asks for, as scripts of its own.
    merged = " ".join(str(folder / name) for name in MERGED)
    loader = found_by(compiler, "ld-linux-x86-64.so.2")
    scripts = {
        "libc.so": f"{folder}/libc.so.6 {found_by(compiler, 'libc_nonshared.a')} {folder}/liblater.a "
        f"AS_NEEDED ( {merged} {loader} )",
        "libm.so": f"{folder}/libm.so.6",
        "libgcc_s.so": f"{folder}/libgcc_s.so.1 {found_by(compiler, 'libgcc.a')}",
        "libstdc++.so": f"{folder}/libstdc++.so.6 {found_by(compiler, 'libstdc++.a')}",
        **{f"{name.split('.')[0]}.so": f"AS_NEEDED ( {folder}/{name} )" for name in MERGED},
    }
    for name, inputs in scripts.items():
        (folder / name).write_text(f"GROUP ( {inputs} )\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute(), sys.argv[2] if len(sys.argv) > 2 else "c++")
