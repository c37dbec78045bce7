"""How many bytes do the Triton kernels ask memory for, beside those that a step must move? Counted without a GPU.

A step of 32 rows, whose begins go through all that rows of an odd length can have, runs in Triton's interpreter, which
gives the addresses and masks of each load and store as they are. The same kernel is compiled for an H100: its layouts
(TTGIR) say which thread has which of these addresses, and its PTX how many elements go in one instruction. For each
instruction of each warp the sectors of 32 bytes that its active threads touch are counted::

    python benchmarks/transactions.py --levels 1 2 4

`asked` is the bytes of these sectors over those of gradient, weight (twice) and moments (four times), each once. In
`beyond L1` a sector that a program loads more than once counts once. Registers and bytes of spills are ptxas's.

What it cannot see: time, and what waits for what; conflicts in shared memory; the tables of a launch, which all
programs read; what L1 and L2 keep from one program to the next; several stores to one sector, which L2 puts together.
"""

from __future__ import annotations

import argparse
import os
import pickle
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

ROWS, SHAPES = 32, {"whole": 4096, "ragged": 5461}
SECTOR = 32
BYTES = {"fp32": 4, "bf16": 2, "int8": 1}  # of a moment
CELL = 64
DTYPES = "WEIGHT", "GRADIENT", "EXP_AVG", "EXP_AVG_SQ"  # constants of a launch
DTYPES_OF = {"fp32": "float32", "bf16": "bfloat16", "int8": "int8", "uint8": "uint8"}


def record(path: str, level: int, dtype: str, columns: int, state_dtype: str) -> None:
    """Run a step in the interpreter; write its launches, each with its loads and stores, to `path`."""
    from triton.runtime import interpreter

    import triton_cases as cases
    from gwt_dist import GWTAdamW

    launches: list[tuple[dict[str, Any], list[Any]]] = []
    run = interpreter.InterpretedFunction.run
    builder = interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store

    def counted_run(self: Any, *args: Any, **constants: Any) -> Any:
        if "LEVEL" in constants:
            plain = {name: value for name, value in constants.items() if isinstance(value, bool | int | float)}
            launches.append((plain | {name: str(constants[name]) for name in DTYPES}, []))
        return run(self, *args, **constants)

    def note(kind: str, pointers: Any, mask: Any) -> None:
        frame: Any = sys._getframe(2)
        lines = []  # of the access and of the call in `phase` that led there
        while frame.f_code.co_name != "phase" and not frame.f_code.co_filename.endswith("triton_kernels.py"):
            if frame.f_code.co_filename.endswith("triton_formats.py"):
                lines.append(frame.f_lineno)
            frame = frame.f_back
        lines.append(frame.f_lineno)
        if pointers.data.size > 1 and frame.f_code.co_name == "phase":
            size = pointers.get_element_ty().primitive_bitwidth // 8
            program = frame.f_locals["item"].handle.data.item()
            launches[-1][1].append((kind, tuple(lines), program, size, pointers.data.copy(), mask.data.copy()))

    def counted_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        note("load", pointers, mask)
        return load(self, pointers, mask, *rest)

    def counted_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        note("store", pointers, mask)
        return store(self, pointers, value, mask, *rest)

    def aligned(like: torch.Tensor) -> torch.Tensor:
        """As memory of a GPU is."""
        size = like.element_size()
        room = torch.empty(like.numel() + 512 // size, dtype=like.dtype)
        return room[(-room.data_ptr() % 512) // size :][: like.numel()].view(like.shape).copy_(like)

    assert cases.triton_module_is_interpreted()
    weight = torch.nn.Parameter(aligned(torch.randn(ROWS, columns).to(getattr(torch, dtype))))
    weight.grad = aligned(torch.randn(ROWS, columns).to(weight.dtype))
    with cases.interpreter(), cases.kernel("triton"):
        optimizer = GWTAdamW([weight], level=level, recipe="energy", state_dtype=state_dtype)
        with (
            patch.object(interpreter.InterpretedFunction, "run", counted_run),
            patch.object(builder, "create_masked_load", counted_load),
            patch.object(builder, "create_masked_store", counted_store),
        ):
            optimizer.step()
    Path(path).write_bytes(pickle.dumps(launches))


def compiled(constants: dict[str, Any]) -> Any:
    """The kernel of a recorded launch for an H100."""
    import triton as compiler
    import triton.language as tl
    from triton.backends.compiler import GPUTarget

    from gwt_dist.kernels import triton
    from gwt_dist.recipes import program_of

    functions = triton._functions(program_of({"recipe": "energy"}, level=1))
    options = {name: constants[name] for name in constants.keys() & {"num_warps", "enable_fp_fusion"}}
    its = {name: value for name, value in constants.items() if name.isupper()}
    its |= {name: getattr(tl, DTYPES_OF[its[name]]) for name in DTYPES}
    its |= dict(SECOND=functions["formulas"].second, CHANGE=functions["details"].change)
    its |= dict(WRITTEN=functions["writes"].written)
    tables = dict(items="*i64", parameters="*i64", rules="*fp64", sizes="*fp64", exchange="*fp32", rho="*fp64")
    signature = tables | dict(partials="*fp64") | dict.fromkeys(its, "constexpr")
    source = compiler.compiler.ASTSource(fn=triton._kernels().phase, signature=signature, constexprs=its)
    return compiler.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def lists(text: str, name: str) -> Any:
    """The list called `name` in an attribute of MLIR."""
    found = re.search(rf"{name} = (\[[\[\]\d, ]*\])", text)
    assert found, (name, text)
    return eval(found[1], {})  # digits, commas and brackets alone


def layout(text: str, shape: tuple[int, ...]) -> list[np.ndarray]:
    """Indices ``[registers, lanes, warps]`` into each dimension of a tensor of `shape` by its layout."""
    if text.startswith("#ttg.slice"):
        dim, parent = re.fullmatch(r"#ttg.slice<\{dim = (\d), parent = (.*)\}>", text).groups()  # type: ignore[union-attr]
        whole = layout(parent, (*shape[: int(dim)], 1, *shape[int(dim) :]))
        return [index for i, index in enumerate(whole) if i != int(dim)]
    if "linear" in text:
        bases = [lists(text, name) for name in ("register", "lane", "warp")]
    else:
        order = lists(text, "order")
        reached = [1] * len(shape)
        bases = []
        steps = [lists(text, name) for name in ("sizePerThread", "threadsPerWarp", "warpsPerCTA")]
        for step in steps:
            bases.append([])
            for dim in order:
                for _ in range(step[dim].bit_length() - 1):
                    basis = [0] * len(shape)
                    basis[dim] = reached[dim] if reached[dim] < shape[dim] else 0
                    reached[dim] *= 2
                    bases[-1].append(basis)
        for dim in order:
            while reached[dim] < shape[dim]:
                bases[0].append([reached[dim] if i == dim else 0 for i in range(len(shape))])
                reached[dim] *= 2
    bases[0] = [basis for basis in bases[0] if any(basis)]  # registers that hold the same are one
    axes = []
    for dim in range(len(shape)):
        index = np.zeros((1, 1, 1), dtype=np.int64)
        for axis, its in enumerate(bases):
            values = np.zeros(1, dtype=np.int64)
            for basis in its:
                values = np.concatenate([values, values ^ basis[dim]])
            index = index ^ values.reshape([-1 if i == axis else 1 for i in range(3)])
        axes.append(index)
    return axes


def accesses(kernel: Any) -> dict[tuple[str, tuple[int, ...]], list[tuple[list[np.ndarray], int]]]:
    """Of each load and store of tensors, by kind and lines: its layout, and the elements of one instruction.

    Lines are those of the access, and of the call in `phase` where it is in a function.
    """
    ttgir, ptx = kernel.asm["ttgir"], kernel.asm["ptx"]
    named = dict(re.findall(r"^(#\w+) = (#ttg.*)$", ttgir, re.M))
    places = dict(re.findall(r"^(#loc\d*) = (loc\(.*\))$", ttgir, re.M))

    def lines(place: str) -> tuple[int, ...]:
        if found := re.search(r"callsite\((#loc\d*) at (#loc\d*)\)", place):
            return lines(places[found[1]]) + lines(places[found[2]])
        if found := re.search(r'\.py":(\d+):', place):
            return (int(found[1]),)
        return lines(places[re.findall(r"#loc\d*", place)[0]])

    bytes_of: dict[tuple[str, tuple[int, ...]], list[int]] = defaultdict(list)
    now: tuple[int, ...] = ()
    for text in ptx.splitlines():
        if found := re.search(r"^\s*\.loc\s+\d+ (\d+) \d+(?:.*@\[ \w+\.py:(\d+):)?", text):
            now = tuple(int(one) for one in found.groups() if one)
        if found := re.search(r"\b(ld|st)\.global(?:\.v(\d))?\.b(\d+)", text):
            bytes_of["load" if found[1] == "ld" else "store", now].append(int(found[2] or 1) * int(found[3]) // 8)
    result = defaultdict(list)
    for text in ttgir.splitlines():
        found = re.search(r"tt\.(load|store) .*: tensor<([\dx]+)x!tt\.ptr<\w*?(\d+)>, (#.*)> loc\((#loc\d+)\)", text)
        if found:
            shape = tuple(map(int, found[2].split("x")))
            encoding = re.sub(r"#\w+(?![\w.])", lambda match: named.get(match[0], match[0]), found[4])
            key = found[1], lines(places[found[5]])
            widths = {width for width in bytes_of[key]}
            index = layout(encoding, shape)
            for width in widths:
                result[key].append((index, width // (int(found[3]) // 8), len(bytes_of[key]), len(widths)))
    checked: dict[tuple[str, tuple[int, ...]], list[tuple[list[np.ndarray], int]]] = {}
    for key, its in result.items():
        assert all(widths == 1 for *_, widths in its), f"{key}: instructions of several widths"
        instructions = sum(index[0].shape[0] // width for index, width, *_ in its)
        assert instructions == its[0][2], f"{key}: {its[0][2]} instructions in PTX, {instructions} by layouts"
        checked[key] = [(index, width) for index, width, *_ in its]
    return checked


def count(level: int, dtype: str, columns: int, state_dtype: str = "fp32") -> tuple[float, float, list[str]]:
    """Bytes asked for and beyond L1, both over the traffic's own, and what ptxas says of each kernel."""
    with tempfile.NamedTemporaryFile() as file:
        environment = {**os.environ, "TRITON_INTERPRET": "1"}
        call = [sys.executable, __file__, "--record", file.name, str(level), dtype, str(columns), state_dtype]
        subprocess.run(call, env=environment, check=True)
        launches = pickle.loads(Path(file.name).read_bytes())
    asked = beyond = 0
    used = []
    for constants, calls in launches:
        kernel = compiled(constants)
        its = accesses(kernel)
        loaded: dict[int, list[np.ndarray]] = defaultdict(list)
        for kind, line, program, size, pointers, mask in calls:
            for index, width in its[kind, line]:
                place = np.broadcast_arrays(*index)
                flat = np.ravel_multi_index([i % n for i, n in zip(place, pointers.shape, strict=True)], pointers.shape)
                active = mask.ravel()[flat]
                if kind == "store":  # of threads that have the same, one stores
                    first = np.zeros(flat.size, dtype=bool)
                    first[np.unique(flat.ravel(), return_index=True)[1]] = True
                    active = active & first.reshape(flat.shape)
                sectors = np.where(active, pointers.ravel()[flat].astype(np.int64) // SECTOR, -1)
                assert size * width <= 16
                registers, lanes, warps = sectors.shape
                sectors = sectors.reshape(registers // width, width * lanes, warps).swapaxes(1, 2)
                ordered = np.sort(sectors.reshape(-1, width * lanes), axis=1)
                new = (ordered[:, 1:] != ordered[:, :-1]) & (ordered[:, 1:] >= 0)
                number = int(new.sum() + (ordered[:, 0] >= 0).sum())
                asked += number
                if kind == "store":
                    beyond += number
                else:
                    loaded[program].append(np.unique(sectors[sectors >= 0]))
        beyond += sum(len(np.unique(np.concatenate(each))) for each in loaded.values())
        used.append(resources(kernel))
    coefficients = -(-columns // 2**level)
    moments = coefficients * BYTES[state_dtype] + (-(-coefficients // CELL) * 4 if state_dtype == "int8" else 0)
    traffic = ROWS * (columns * 3 * (4 if dtype == "float32" else 2) + moments * 4)  # each of both is read and written
    return asked * SECTOR / traffic, beyond * SECTOR / traffic, used


def resources(kernel: Any) -> str:
    """Registers of a thread and bytes of its stack, by the cuobjdump that comes with triton."""
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(kernel.asm["cubin"])
        tool = triton.knobs.nvidia.cuobjdump.path
        told = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return "{} / {}".format(*re.findall(r"REG:(\d+) STACK:(\d+)", told)[-1])


def main() -> None:
    """Print the table of the levels of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--levels", type=int, nargs="+", default=[1, 2, 3, 4, 5, 6])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--state-dtype", default="fp32", choices=BYTES)
    given = parser.parse_args()
    print("| dtype | level | rows | asked | beyond L1 | registers / spills of each kernel |")
    print("| --- | --- | --- | --- | --- | --- |")
    for dtype in given.dtypes:
        for level in given.levels:
            for name, columns in SHAPES.items():
                asked, beyond, used = count(level, dtype, columns, given.state_dtype)
                shape = f"{ROWS}x{columns}, {name}"
                print(f"| {dtype} | {level} | {shape} | {asked:.3f} | {beyond:.3f} | {', '.join(used)} |", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--record"]:
        record(sys.argv[2], int(sys.argv[3]), sys.argv[4], int(sys.argv[5]), sys.argv[6])
    else:
        main()
