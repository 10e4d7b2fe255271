"""Compile a kernel for a GPU that is not here, and read from the machine code what it needs there."""

from __future__ import annotations

import inspect
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .kernel_examples import Launch

# The most that one program may take, in bytes, by compute capability: CUDA C++ Programming Guide, "Technical
# Specifications per Compute Capability".
SHARED_LIMIT = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
CAPABILITIES = tuple(SHARED_LIMIT)
NAMES = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16",
    torch.uint8: "u8", torch.int16: "i16", torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip


@dataclass(frozen=True)
class Usage:
    """What the machine code of one program takes.

    Attributes:
        registers: A thread.
        stack: Bytes a thread.
        spills: Instructions that load from or store to the stack.
        shared: Bytes of shared memory.
        instructions: In the code, each counted once.
        loop: Those of the longest loop.
        inner: Those of the longest loop that has no other in it.
        units: What multiplies matrices: "HGMMA" (Hopper's), "UTCHMMA" (Blackwell's), "HMMA", or "" for none.
    """

    registers: int
    stack: int
    spills: int
    shared: int
    instructions: int
    loop: int
    inner: int
    units: str


def source_of(launch: Launch, config: triton.Config) -> ASTSource:
    """The source with the types and specialisations of the launch, as Triton's own launcher would make it."""
    function = launch.function
    given = {**launch.arguments, **config.kwargs}
    signature, constants, divisible = {}, {}, []
    for place, parameter in enumerate(function.params):
        name, value = parameter.name, given[parameter.name]
        plain = getattr(parameter, "do_not_specialize", False)
        if parameter.is_constexpr or value is None or (not plain and type(value) is int and value == 1):
            signature[name], constants[name] = "constexpr", value
            continue
        signature[name] = _type_of(value)
        # memory of torch's allocator starts at multiples of 512, and a view of rows in it at multiples of a row
        aligned = isinstance(value, Tensor) or (not plain and type(value) is int and value % 16 == 0)
        if aligned:
            divisible.append(place)
    # Triton 3.2 has another name for constants, and another form of attributes
    if "constexprs" not in inspect.signature(ASTSource).parameters:
        from triton.backends.compiler import AttrsDescriptor

        old = AttrsDescriptor.from_dict({"arg_properties": {"tt.divisibility": divisible}, "cls": "AttrsDescriptor"})
        return ASTSource(fn=function, signature=signature, constants=constants, attrs=old)
    attributes = {(place,): [["tt.divisibility", 16]] for place in divisible}
    return ASTSource(fn=function, signature=signature, constexprs=constants, attrs=attributes)


def _type_of(value: object) -> str:
    if isinstance(value, Tensor):
        return "*" + NAMES[value.dtype]
    if isinstance(value, bool):
        return "i1"
    if isinstance(value, float):
        return "fp32"
    assert isinstance(value, int)
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def offered(capability: int, launch: Launch) -> list[triton.Config]:
    """The configurations that a GPU tries."""
    return launch.configs(SHARED_LIMIT[capability] // 1024)


def compile_for(capability: int, launch: Launch, config: triton.Config) -> triton.compiler.CompiledKernel:
    """The machine code of a launch."""
    target = GPUTarget("cuda", capability, 32)
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    return triton.compile(source_of(launch, config), target=target, options=options)


def usage(compiled: triton.compiler.CompiledKernel) -> Usage:
    """Read from the machine code itself."""
    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "kernel.cubin"
        path.write_bytes(compiled.asm["cubin"])
        command = [program, "--dump-resource-usage", "--dump-sass", path]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    # "/*0a30*/   @P0 LDG.E.128 R4, ..."
    lines = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?\w+ )?([A-Z]\w*)(.*?);", said, re.MULTILINE)
    resources = re.search(r"REG:(\d+) STACK:(\d+)", said)
    assert resources, said[:1000]
    assert lines, said[:1000]
    kinds = [kind for _, kind, _ in lines]
    units = next((kind for kind in ("UTCHMMA", "HGMMA", "HMMA") if kind in kinds), "")
    places = [int(place, 16) for place, _, _ in lines]
    loops = []
    for number, (_, kind, rest) in enumerate(lines):
        target = re.search(r"0x([0-9a-f]+)", rest) if kind == "BRA" else None
        # a jump to itself ends every kernel
        if target and int(target[1], 16) < places[number]:
            loops.append((places.index(int(target[1], 16)), number))
    inner = [one for one in loops if not any(one != other and _within(other, one) for other in loops)]
    longest, innermost = (max((last - first + 1 for first, last in found), default=0) for found in (loops, inner))
    spills = kinds.count("LDL") + kinds.count("STL")
    registers, stack = int(resources[1]), int(resources[2])
    return Usage(registers, stack, spills, compiled.metadata.shared, len(lines), longest, innermost, units)


def _within(one: tuple[int, int], other: tuple[int, int]) -> bool:
    return other[0] <= one[0] and one[1] <= other[1]


def narrow_products(compiled: triton.compiler.CompiledKernel) -> list[str]:
    """Where blocks of addresses come from products of 32 bits, which wrap in a tensor of 2^31 elements: its lines."""
    made, used = {}, []
    for line in compiled.asm["ttir"].splitlines():
        found = re.match(r"\s*(?:(%\w+)(?::\d+)? = )?(?:\w+\.)?(\w+)(.*)", line)
        if found:
            made[found[1]] = (found[2], re.findall(r"%\w+", found[3]), line)
            if found[2] == "addptr":
                used.append(re.findall(r"%\w+", found[3])[1])
    seen, narrow = set(), []
    while used:
        name = used.pop()
        if name in seen or name not in made:
            continue
        seen.add(name)
        kind, operands, line = made[name]
        if kind == "muli" and re.search(r": tensor<[\dx]+xi32>", line):
            narrow.append(line.strip())
        # an index that was loaded, or chosen by a comparison, is no product of what it was loaded or chosen by
        used += [] if kind in ("load", "cmpi") else operands
    return narrow


def copied_ahead(compiled: triton.compiler.CompiledKernel) -> list[str]:
    """The blocks that are copied to shared memory while others are computed, such as "64x64xbf16"."""
    pattern = r"async_copy_global_to_local .*tensor<([\dx]+x)!\w+\.ptr<(\w+)>"
    return sorted({shape + dtype for shape, dtype in re.findall(pattern, compiled.asm["ttgir"])})


def loads_of_16_bytes(compiled: triton.compiler.CompiledKernel) -> int:
    """How many instructions load 16 bytes a thread to registers."""
    return len(re.findall(r"\bld\.global\S*\.v4\.b32\b", compiled.asm["ptx"]))
