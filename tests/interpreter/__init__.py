"""Triton's interpreter, mended for tests on machines without a GPU: `mend()`, before any kernel runs.

The interpreter runs a kernel's Python on CPU tensors, program by program, with numpy for each op. As released it
computes bfloat16 on its bit patterns, truncates where hardware rounds, reads and writes wherever a pointer happens to
point, drops `tl.device_assert`, and spends most of its time on patching the language. Mended, it

- computes bf16 in float32 and rounds to nearest even; accumulates fp16 and bf16 dots in float32; rounds for TF32 dots;
- raises OutOfBounds for every live lane outside the tensor that its pointer was made from;
- raises where tl.device_assert fails, and where int32 arithmetic overflows, as Triton's debug mode does on a GPU;
- treats float arguments, `and`, `or`, `not`, tl.maximum of NaN and unknown options as the compiler does;
- reduces and scans with any combining function in log2(n) vector steps;
- raises what the kernel raised, with the kernel's line in the traceback.

It refuses fp8 casts. It cannot show races between programs or threads, shared memory, or whether a kernel compiles.
All of this replaces private parts of Triton, so only some versions are supported.
"""

from __future__ import annotations

SUPPORTED = ((3, 6), (3, 7), (3, 8), (3, 9))


class OutOfBounds(IndexError):
    """A live lane of a load, store or atomic lies outside the tensor that its pointer was made from."""


def mend() -> None:
    """Replaces what is broken or slow in the interpreter of this process; a second call changes nothing.

    Raises ImportError for a Triton that is not SUPPORTED, and one that was imported without TRITON_INTERPRET=1.
    """
    import triton

    if tuple(int(part) for part in triton.__version__.split(".")[:2]) not in SUPPORTED:
        wanted = " to ".join(".".join(map(str, version)) for version in (SUPPORTED[0], SUPPORTED[-1]))
        raise ImportError(
            f"the mended interpreter replaces private parts of Triton {wanted}, found {triton.__version__}"
        )
    # Late: other versions may lack them, and nothing of Triton may be imported before the switch is set.
    import triton.language as tl
    from triton.runtime import interpreter as stock

    if not isinstance(tl.sum, stock.InterpretedFunction):
        raise ImportError("Triton was imported before TRITON_INTERPRET=1 was set, so its kernels are compiled ones")
    from tests.interpreter import kept, launch, memory, numbers, reductions

    if not hasattr(stock, "mended_for_fastsae"):
        stock.mended_for_fastsae = True
        for part in (numbers, memory, reductions, launch, kept):
            part.mend()
