r"""Run the CUDA kernels of csrc/ on the CPU: the same source and launchers, compiled by g++ for a device in software.

``emulated`` compiles a ``.cu`` file once (into build/cuda_emulation, by content) and gives its launchers::

    kernels = emulated("ops/affine_forward/affine_forward.cu")
    report = kernels.launch("affine_forward_cuda", seed, shape=shape, x=x, raw=raw, z=z, log_det=log_det, stream=False)
    assert report.read["x"] == x.nbytes

The keywords are the fields of the launcher's struct, which is read from the header beside the ``.cu`` file. A struct
takes a mapping; a view (a struct that begins with ``data``: Rows, Heads, HeadRows, Matrix) takes a CPU tensor, from
which pointer, strides and dtype come; a pointer takes a tensor, or of structs a list of mappings; an enum takes the
name of a value, or a torch.dtype; what is left out or None is zero. Results are written into the tensors given.

``launch`` raises EmulationError for whatever a device would punish, and for most of what it would not:

- an access outside of the tensors that were given, or of the block's shared memory;
- two threads at one byte of shared memory without a barrier between them, whichever came first this time, and any
  access to what ``cp.async`` or TMA still writes, or any write to what ``wgmma`` still reads: by happens-before, in
  every schedule;
- with ``watch_blocks``, what a block reads or overwrites of what another block of the launch wrote, unless it was told
  by a count in memory: with fences on both sides, and barriers to the other threads;
- what TMA or ``wgmma`` should see of a thread's writes, without a fence of proxies;
- what an early launch (programmatic dependent launch) touches before it has waited for the launches in front of it,
  and a block that waits for one with a higher number;
- arrivals at a named barrier that nobody waits for, two of a thread in one phase, and other numbers of threads;
- warp collectives that lanes reach with different masks, warps of a group that come to different ``wgmma``, barriers
  that not all reach, too many arrivals at an mbarrier, misaligned copies, what is in flight when a block ends.

The seed orders threads: at random, or one warp far ahead; copies of TMA arrive late and in any order. Shared memory is
NaN before each block, and sums of ``wgmma`` until they are waited for. The ``Report`` has bytes and sectors of each
tensor, bank conflicts, barriers and products of tensor cores. Blocks run one after another.

Streams that capture, graphs and their WHILE nodes are in emulator/graphs.cpp, under the names of the CUDA runtime:
captured launches are kept with their arguments, and run by the graph.

Kernels must launch by ``cuda::enqueue`` and name dynamic shared memory by ``STARFLOW_SHARED_MEMORY`` (csrc/cuda). CuTe
and CUTLASS run unmodified for mma.sync, ldmatrix and cp.async, and in ``<op>_sm90.cu`` for TMA, mbarriers and wgmma of
16 bits, which launchers of other sources call as in a build for sm_90a; emulator/include has their few headers with
assembly. Not modelled: speed, weak memory order, clusters, stores by TMA; ``setmaxnreg``
does nothing.

Mutation tests: ``mutations`` makes one Mutation of each place where a pattern matches, and ``assert_caught`` compiles
the mutated source and wants the check to fail (``switches`` compiles all mutations of a source at once). A check takes
the compiled ``Kernels``::

    SOURCE = "ops/block_attention/block_attention.cu"

    @pytest.mark.parametrize("mutation", mutations(SOURCE, {r"__syncthreads\(\);": "", "row < rows": "true"}), ids=str)
    def test_mutation_is_caught(mutation):
        assert_caught(SOURCE, mutation, check)
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import pytest
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
HERE = Path(__file__).resolve().parent
EMULATOR = HERE / "emulator"
CACHE = ROOT / "build/cuda_emulation"

SEEDS = range(8)

Found = TypeVar("Found")

# -fno-tree-sra leaves an access of 16 bytes whole. Products and sums are fused by nvcc, but not here.
COMMON = ("-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-Wall", "-Wno-unknown-pragmas")
KERNEL = ("-fno-tree-sra", "-Wno-attributes", "-DSTARFLOW_CUDA=1", "-DSTARFLOW_X86=1")
# For the emulator to see every access, or for AddressSanitizer to look at a thread's own arrays too.
SEEN, SANITIZED = ("-fsanitize=thread",), ("-fsanitize=address", "-g1")
# Launchers may call those for sm_90a and sm_100f, as in a build for them.
WITH_ALL = ("-DSTARFLOW_SM90=1", "-DSTARFLOW_SM100=1")
# Of a source for one of them: TMA by the emulated driver, and CUTLASS without its checks, which are assembly.
SM90 = ("-DCUTLASS_ENABLE_DIRECT_CUDA_DRIVER_CALL", "-DNDEBUG")
SM90 += ("-D__CUDACC_VER_MAJOR__=13", "-D__CUDACC_VER_MINOR__=0")
# A name that changes its meaning in CUTLASS's pipelines of sm_100 is an error without -fpermissive.
SM100 = (*SM90, "-DEMULATION_SM100", "-fpermissive")
OF_ONE = {"_sm90": SM90, "_sm100": SM100}


class EmulationError(Exception):
    """A kernel did what a device would punish."""


class CompileError(Exception):
    """A source that g++ refuses."""


@dataclass(frozen=True)
class Mutation:
    """One change of a file in csrc/: the characters from ``begin`` to ``end`` become ``new``."""

    file: str
    begin: int
    end: int
    new: str

    def __str__(self) -> str:
        text = (CSRC / self.file).read_text()
        line = text.count("\n", 0, self.begin) + 1
        return f"{Path(self.file).name}:{line}:{text[self.begin : self.end]}->{self.new or 'nothing'}"

    def applied(self) -> str:
        text = (CSRC / self.file).read_text()
        return text[: self.begin] + self.new + text[self.end :]


def mutations(file: str, changes: Mapping[str, str]) -> list[Mutation]:
    """Make a mutation of each place where a regular expression matches, replaced by the text beside it."""
    found = []
    for pattern, new in changes.items():
        matches = list(re.finditer(pattern, (CSRC / file).read_text()))
        assert matches, f"{pattern} matches nothing in {file}"
        found += [Mutation(file, match.start(), match.end(), new) for match in matches]
    return found


def some(found: list[Found]) -> list[Found]:
    """A tenth of mutations that are compiled one by one, or, with `STARFLOW_MUTATIONS=all`, all."""
    return found if os.environ.get("STARFLOW_MUTATIONS") == "all" else found[::10]


@dataclass(frozen=True)
class Report:
    """What the launches of one call did; tensors by the names of their fields, as in "query.cos"."""

    launches: int
    blocks: int
    barriers: int
    collectives: int
    products: int
    matrices: int
    async_copies: int
    group_products: int
    tensor_products: int
    tensor_copies: int
    bank_conflicts: int
    shared_bytes: int
    threads: int
    early_launches: int
    read: Mapping[str, int]
    written: Mapping[str, int]
    sectors_read: Mapping[str, int]
    sectors_written: Mapping[str, int]


class _Tensor(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char_p),
        ("begin", ctypes.c_void_p),
        ("end", ctypes.c_void_p),
        ("read", ctypes.c_int64),
        ("written", ctypes.c_int64),
        ("sectors_read", ctypes.c_int64),
        ("sectors_written", ctypes.c_int64),
    ]


class _Counts(ctypes.Structure):
    _fields_ = [(field.name, ctypes.c_int64) for field in fields(Report) if field.type == "int"]


_SCALARS = {
    "int64_t": ctypes.c_int64,
    "int32_t": ctypes.c_int32,
    "uint32_t": ctypes.c_uint32,
    "int": ctypes.c_int,
    "float": ctypes.c_float,
    "double": ctypes.c_double,
    "bool": ctypes.c_bool,
}


class _Declarations:
    """The plain structs, enums and launchers of a source and of the project's headers that it includes."""

    def __init__(self, source: Path) -> None:
        text = "\n".join(re.sub(r"//[^\n]*", "", path.read_text()) for path in _reached(source))
        self.launchers = {
            name: args for args, name in re.findall(r"STARFLOW_DECLARE_(?:CUDA|SM90|SM100)\((\w+), (\w+)\)", text)
        }
        self._bodies = dict(re.findall(r"\bstruct (\w+) \{(.*?)\n\};", text, re.DOTALL))
        self.enums = {
            name: [value.strip() for value in values.split(",")]
            for name, values in re.findall(r"enum class (\w+) : int32_t \{([^}]*)\}", text)
        }
        self._structs: dict[str, type[ctypes.Structure]] = {}
        self.types: dict[str, dict[str, str]] = {}

    def struct(self, name: str) -> type[ctypes.Structure]:
        if name not in self._structs:
            fields, types = [], {}
            for statement in self._bodies[name].split(";"):
                match = re.fullmatch(r"\s*(?:const )?(\w+)(\*?) ([\w, ]+?)(?: = [^,]+)?", statement)
                if match is None:
                    continue
                kind, pointer, names = match.groups()
                for field in names.split(", "):
                    fields.append((field, self._type(kind, pointer)))
                    types[field] = kind
            self._structs[name] = type(name, (ctypes.Structure,), {"_fields_": fields})
            self.types[name] = types
        return self._structs[name]

    def _type(self, kind: str, pointer: str) -> Any:
        if pointer:
            return ctypes.c_void_p
        if kind in self.enums:
            return ctypes.c_int32
        return _SCALARS.get(kind) or self.struct(kind)


def _reached(source: Path) -> list[Path]:
    """The source and the project's files that it includes, through each other."""
    found: list[Path] = []
    queue = [source]
    while queue:
        path = queue.pop()
        if path in found:
            continue
        found.append(path)
        for name in re.findall(r'^#include "([^"]+)"', path.read_text(), re.MULTILINE):
            queue += [folder / name for folder in (CSRC, path.parent) if (folder / name).is_file()][:1]
    return found


class Kernels:
    """A compiled source: its launchers."""

    def __init__(self, library: Path, declarations: _Declarations) -> None:
        self._library = ctypes.CDLL(str(library))
        self._library.emulation_end.restype = ctypes.c_char_p
        self._declarations = declarations
        self._arrays: list[ctypes.Array[Any]] = []
        for args in declarations.launchers.values():
            size = getattr(self._library, f"size_of_{args}")()
            assert ctypes.sizeof(declarations.struct(args)) == size, f"{args} was not read as the compiler reads it"

    def launch(self, launcher: str, seed: int, /, *, watch_blocks: bool = False, **values: Any) -> Report:
        """Call a launcher; the keywords are the fields of its struct.

        With ``watch_blocks``, what a block reads of what others of the launch wrote must have been told to it.
        """
        name = self._declarations.launchers[launcher]
        tensors: dict[str, Tensor] = {}
        self._arrays.clear()
        args = self._struct(name, values, "", tensors)
        held = [
            (key.encode(), tensor.data_ptr(), tensor.data_ptr() + _extent(tensor)) for key, tensor in tensors.items()
        ]
        array = (_Tensor * len(held))(*held)
        self._library.emulation_begin(ctypes.c_uint64(seed), array, ctypes.c_int64(len(held)), int(watch_blocks))
        code = getattr(self._library, f"run_{launcher}")(ctypes.byref(args))
        counts = _Counts()
        error = self._library.emulation_end(ctypes.byref(counts)).decode()
        if error or code:
            raise EmulationError(f"{launcher}: {error or f'error {code} of the CUDA runtime'}")
        by_name = {
            field: {key: getattr(entry, field) for key, entry in zip(tensors, array, strict=True)}
            for field in ("read", "written", "sectors_read", "sectors_written")
        }
        return Report(**{field: getattr(counts, field) for field, _ in _Counts._fields_}, **by_name)

    @property
    def runtime(self) -> Any:
        """The functions of the device in software that are for tests (emulator/runtime.h, graphs.h)."""
        return self._library

    def set_int(self, name: str, value: int) -> None:
        """Give a global ``int`` of the source, declared ``extern "C"`` and visible, a value."""
        ctypes.c_int.in_dll(self._library, name).value = value

    def _struct(self, name: str, values: Mapping[str, Any], path: str, tensors: dict[str, Tensor]) -> ctypes.Structure:
        struct = self._declarations.struct(name)
        types = self._declarations.types[name]
        unknown = set(values) - set(types)
        assert not unknown, f"{name} has no field {unknown}"
        made = struct()
        for field, kind in struct._fields_:
            if values.get(field) is not None:
                setattr(made, field, self._value(types[field], kind, values[field], f"{path}{field}", tensors))
        return made

    def _value(self, name: str, kind: Any, value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
        enums = self._declarations.enums
        if name in enums and not isinstance(value, Tensor):
            return enums[name].index(str(value).removeprefix("torch."))
        if isinstance(value, Tensor):
            tensors[path] = value
            return value.data_ptr() if kind is ctypes.c_void_p else self._view(name, value)
        if isinstance(value, Mapping):
            return self._struct(name, value, f"{path}.", tensors)
        if isinstance(value, list):
            items = [self._struct(name, item, f"{path}[{i}].", tensors) for i, item in enumerate(value)]
            self._arrays.append((self._declarations.struct(name) * len(items))(*items))
            return ctypes.addressof(self._arrays[-1])
        return value

    def _view(self, name: str, tensor: Tensor) -> ctypes.Structure:
        struct = self._declarations.struct(name)
        strides = [field for field, _ in struct._fields_ if field.endswith("_stride")]
        assert tensor.dim() == len(strides) + 1, f"{name} is a view of {len(strides) + 1} dimensions"
        assert tensor.stride(-1) == 1 or tensor.shape[-1] <= 1, f"{name} has its channels side by side"
        made = struct(data=tensor.data_ptr(), **dict(zip(strides, tensor.stride(), strict=False)))
        if "dtype" in self._declarations.types[name]:
            made.dtype = self._declarations.enums["Dtype"].index(str(tensor.dtype).removeprefix("torch."))
        return made


def _extent(tensor: Tensor) -> int:
    """Bytes from the first element of a view to the end of its last."""
    if tensor.numel() == 0:
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


@cache
def _toolkit() -> tuple[str, tuple[str, ...]]:
    """The compiler, and its options for finding CUDA's headers and CUTLASS's."""
    if platform.machine() != "x86_64":
        pytest.skip(f"the emulated device switches stacks on x86_64 only, this is {platform.machine()}")
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("g++ is not on PATH")
    nvcc = shutil.which("nvcc")
    roots = [Path(root) for root in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")) if root]
    roots += [Path("/usr/local/cuda"), *([Path(nvcc).resolve().parents[1]] if nvcc else [])]
    cuda = next((root / "include" for root in roots if (root / "include/cuda_runtime.h").is_file()), None)
    if cuda is None:
        pytest.skip("CUDA's headers are not here (CUDA_HOME, or nvcc on PATH)")
    include = [cuda, cuda / "cccl"]
    spec = importlib.util.find_spec("cutlass_library")
    if spec is not None and spec.submodule_search_locations:
        include.insert(0, Path(spec.submodule_search_locations[0]) / "source/include")
    return compiler, tuple(part for path in include for part in ("-isystem", str(path)))


def _compile(name: str, text: str, flags: tuple[str, ...], files: Iterator[Path], link: tuple[str, ...] = ()) -> Path:
    """A shared library of a source, built unless one of the same content is there."""
    compiler, system = _toolkit()
    digest = hashlib.sha256(repr((compiler, text, flags, system, link)).encode())
    for path in sorted(files):
        digest.update(path.read_bytes())
    library = CACHE / f"{name}-{digest.hexdigest()[:16]}.so"
    if library.is_file():
        return library
    CACHE.mkdir(parents=True, exist_ok=True)
    built = library.with_suffix(f".{os.getpid()}")
    source, unlinked = Path(f"{built}.cpp"), Path(f"{built}.o")
    source.write_text(text)
    try:
        # Two steps: linked with -fsanitize=thread, the library would get the sanitizer's own.
        for command in (
            [*COMMON, *flags, *system, "-c", str(source), "-o", str(unlinked)],
            ["-shared", str(unlinked), *link, "-Wl,-z,defs", "-o", str(built)],
        ):
            done = subprocess.run([compiler, *command], capture_output=True, text=True, check=False)
            if done.returncode != 0:
                errors = [line for line in done.stderr.splitlines() if re.search("error|undefined", line)]
                raise CompileError(f"{name}: " + "\n".join(errors))
        os.replace(built, library)
    finally:
        source.unlink(missing_ok=True)
        unlinked.unlink(missing_ok=True)
    return library


@cache
def _runtime(sanitized: bool) -> Path:
    files = (path for path in EMULATOR.glob("*.*"))
    text = "".join(f'#include "{EMULATOR}/{name}.cpp"\n' for name in ("hopper", "blackwell", "graphs"))
    return _compile("runtime", text, ("-O2", *SANITIZED) if sanitized else ("-O2",), files, _linked(sanitized))


def _linked(sanitized: bool) -> tuple[str, ...]:
    return SANITIZED if sanitized else ()


@cache
def emulated(
    source: str, mutation: Mutation | None = None, flags: tuple[str, ...] = (), *, sanitized: bool = False
) -> Kernels:
    """Compile a ``.cu`` file for the emulated device, and those whose launchers it calls, without the mutation.

    Args:
        source: path in csrc/, or beside this file.
        mutation: a change of one of its files.
        flags: further options of the compiler, such as a definition that leaves instantiations out.
        sanitized: by AddressSanitizer, for a process that has it loaded; nothing is counted then, and no race noticed.

    Returns:
        Its launchers: those that it and its headers declare by STARFLOW_DECLARE_CUDA, and that it defines.
    """
    library, declarations = _library(source, mutation, flags, sanitized)
    return Kernels(library, declarations)


@cache
def _library(
    source: str, mutation: Mutation | None, flags: tuple[str, ...], sanitized: bool
) -> tuple[Path, _Declarations]:
    """The library of a source, which shows its launchers, and what was read of it."""
    path = next(folder / source for folder in (CSRC, HERE) if (folder / source).is_file())
    files = _reached(path)
    declarations = _Declarations(path)
    text = path.read_text()
    defined = {
        name for name, args in declarations.launchers.items() if re.search(rf"\bint {name}\(const {args}&", text)
    }
    of_one = next((flags for suffix, flags in OF_ONE.items() if path.stem.endswith(suffix)), ())
    # The sanitizer would take minutes for all tiles of one architecture: there, they are null for those that call them.
    with_all = bool(of_one) or not sanitized
    others = [name for name in declarations.launchers if name not in defined and (with_all or "_sm" not in name)]
    called = sorted(name for name in others if re.search(rf"\b{name}\b", text))
    declarations.launchers = {name: args for name, args in declarations.launchers.items() if name in defined}
    overlay: tuple[str, ...] = ()
    if mutation is not None:
        folder = CACHE / "mutated" / hashlib.sha256(mutation.applied().encode()).hexdigest()[:16]
        changed = folder / mutation.file
        changed.parent.mkdir(parents=True, exist_ok=True)
        changed.write_text(mutation.applied())
        overlay = ("-I", str(folder))
        files.append(changed)
        if CSRC / mutation.file == path:
            path = changed
    shown = "".join(
        f'struct {args}; __attribute__((visibility("default"))) int {name}(const {args}&, void*);\n'
        for name, args in declarations.launchers.items()
    )
    calls = [f'namespace starflow {{\n{shown}}}\n#include "{path}"\n']
    for name, args in declarations.launchers.items():
        calls.append(
            f'extern "C" __attribute__((visibility("default"))) int run_{name}(const void* args) {{ '
            f"return starflow::{name}(*static_cast<const starflow::{args}*>(args), nullptr); }}\n"
            f'extern "C" __attribute__((visibility("default"))) int size_of_{args}() {{ '
            f"return sizeof(starflow::{args}); }}\n"
        )
    files += [found for found in EMULATOR.rglob("*") if found.is_file()]
    own = (*flags, *(WITH_ALL if with_all else ()), *of_one)
    include = (*overlay, "-I", str(EMULATOR / "include"), "-I", str(CSRC))
    beside = [str(_library(_defining(name), None, flags, sanitized)[0]) for name in called]
    checked = SANITIZED if sanitized else SEEN
    link = (*beside, str(_runtime(sanitized)), f"-Wl,-rpath,{CACHE}", *_linked(sanitized))
    library = _compile(path.stem, "".join(calls), (*KERNEL, *checked, *own, *include), iter(files), link)
    return library, declarations


@cache
def _defining(launcher: str) -> str:
    """The source of a launcher."""
    found = [path for path in CSRC.rglob("*.cu") if re.search(rf"\bint {launcher}\(const ", path.read_text())]
    (source,) = found
    return str(source.relative_to(CSRC))


def assert_caught(
    source: str, mutation: Mutation, check: Callable[[Kernels], None], flags: tuple[str, ...] = ()
) -> None:
    """Compile a mutated source and want ``check`` to fail on it: by a wrong value, or by what the device notices."""
    kernels = emulated(source, mutation, flags)
    try:
        check(kernels)
    except (EmulationError, AssertionError):
        return
    pytest.fail(f"nothing notices the mutation {mutation}")
