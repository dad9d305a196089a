"""The seeded bugs of cuda.py: ten or more for each kind of kernel, each with the rung that must see it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Bug:
    kind: str  # of kernel
    name: str
    file: str  # under csrc
    right: str  # stands once in the file
    wrong: str
    rung: str
    operator: str  # on which it shows


def _bugs(kind, *rows):
    return [Bug(kind, *row) for row in rows]


FUSED, GRAD_AX, GRAD_SB = "cuda/lora_fused.cu", "cuda/lora_grad_ax.cu", "cuda/lora_grad_sb.cu"
SHRINK, STAGED, MASK = "cuda/lora_shrink.cu", "cuda/staged.h", "cuda/mask.h"
EWC, REDUCE, PARTIALS, ENTROPY = "cuda/ewc.cu", "cuda/reduce.h", "cuda/partials.h", "cuda/cross_entropy.cu"
DROPOUT, ELEMENTS, LAUNCH = "cuda/dropout.cu", "cuda/elements.h", "cuda/launch.h"

BUGS = (
    _bugs(
        "product",
        (
            "no barrier in the pipeline",
            FUSED,
            "STAGES - 2>();\n    __syncthreads();",
            "STAGES - 2>();",
            "ptx",
            "lora_fused",
        ),
        (
            "waits for one copy too few",
            FUSED,
            "cp_async_wait<Tile::STAGES - 2>",
            "cp_async_wait<Tile::STAGES - 1>",
            "emulator",
            "lora_fused",
        ),
        (
            "refills a stage before the barrier",
            FUSED,
            "__syncthreads();\n    issue(tile + Tile::STAGES - 1);",
            "issue(tile + Tile::STAGES - 1);\n    __syncthreads();",
            "tsan",
            "lora_fused",
        ),
        ("no swizzle", FUSED, "((chunk ^ (row >> 1)) & 3)", "(chunk & 3)", "counts", "lora_fused"),
        (
            "no padding of tiles",
            STAGED,
            "PITCH = COLUMNS + 16 / int(sizeof(T))",
            "PITCH = COLUMNS",
            "counts",
            "lora_grad_ax",
        ),
        ("tail of depth left unmasked", SHRINK, "a.A.columns - column - 8 * t : 0", "8 : 0", "emulator", "lora_shrink"),
        ("tail of ranks left unmasked", SHRINK, "n * MMA_COLUMNS + g < ranks ?", "true ?", "emulator", "lora_shrink"),
        ("tail of rows written", SHRINK, "if (m >= a.x.rows) continue;", "", "emulator", "lora_shrink"),
        (
            "mask of another row",
            SHRINK,
            "mask.draw(uint32_t(row + 8 * i)",
            "mask.draw(uint32_t(row)",
            "emulator",
            "lora_shrink",
        ),
        ("scale forgotten", SHRINK, "from_float<T>(a.scale * sum)", "from_float<T>(sum)", "emulator", "lora_shrink"),
        (
            "next tile over the one in use",
            GRAD_AX,
            "OfS{dS + (now ^ 1) * OfS::SIZE}.fill",
            "OfS{dS + now * OfS::SIZE}.fill",
            "ptx",
            "lora_grad_ax",
        ),
        (
            "result over a tile still read",
            GRAD_AX,
            "__syncthreads();  // x is read: its place is free",
            "",
            "ptx",
            "lora_grad_ax",
        ),
        (
            "mask missing in dX",
            GRAD_AX,
            "keep ? out.get(i) : from_bits<T>(0)",
            "out.get(i)",
            "emulator",
            "lora_grad_ax",
        ),
        (
            "a tile's row too many",
            STAGED,
            "i < EIGHTS; i += blockDim.x",
            "i < EIGHTS + COLUMNS / 8; i += blockDim.x",
            "emulator",
            "lora_grad_sb",
        ),
        (
            "copies of the last rows not waited for",
            GRAD_SB,
            "    cp_async_wait<0>();\n    __syncthreads();  // the tile is complete",
            "    __syncthreads();  // the tile is complete",
            "emulator",
            "lora_grad_sb",
        ),
        ("registers for four blocks", FUSED, "== 2 ? Tile::BLOCKS : 1)", "== 2 ? 4 : 1)", "codegen", "lora_fused"),
    )
    + _bugs(
        "reduction",
        ("no barrier before the warps' sums are read", REDUCE, "  __syncthreads();\n", "", "tsan", "ewc"),
        (
            "no barrier before the chunk is read",
            EWC,
            "  __syncthreads();\n  return chunk;",
            "  return chunk;",
            "schedules",
            "ewc",
        ),
        (
            "no barrier before the depth warps' sums are read",
            SHRINK,
            "    __syncthreads();\n",
            "",
            "ptx",
            "lora_shrink",
        ),
        (
            "a warp's sum is missing",
            REDUCE,
            "warp < THREADS / WARP; warp++",
            "warp < THREADS / WARP - 1; warp++",
            "emulator",
            "ewc",
        ),
        (
            "half of a warp is missing",
            REDUCE,
            "distance = WARP / 2; distance;",
            "distance = WARP / 4; distance;",
            "emulator",
            "ewc",
        ),
        (
            "a partial sum is missing",
            PARTIALS,
            "part < parts; part++",
            "part < parts - (parts > 1); part++",
            "emulator",
            "lora_grad_sb",
        ),
        (
            "the last chunk's value is missing",
            EWC,
            "i = threadIdx.x; i < n;",
            "i = threadIdx.x; i < n - 1;",
            "emulator",
            "ewc",
        ),
        (
            "blocks add to one sum",
            EWC,
            "store(partials + blockIdx.x, value)",
            "store(partials, load(partials) + value)",
            "ptx",
            "ewc",
        ),
        (
            "chunks overlap",
            EWC,
            "load(table.first_chunk + low)) * CHUNK;",
            "load(table.first_chunk + low)) * (CHUNK - 8);",
            "ptx",
            "ewc",
        ),
        (
            "a chunk of the tensor before",
            EWC,
            "load(table.first_chunk + middle) <= index",
            "load(table.first_chunk + middle) < index",
            "emulator",
            "ewc",
        ),
        (
            "tail of a tensor left unmasked",
            EWC,
            "f(chunk.begin + e, int(rest < 8 ? rest : 8));",
            "f(chunk.begin + e, 8);",
            "emulator",
            "ewc",
        ),
        (
            "sums of different maxima added",
            ENTROPY,
            "a.total * expf(a.largest - largest)",
            "a.total",
            "emulator",
            "cross_entropy",
        ),
    )
    + _bugs(
        "elementwise",
        (
            "index of the next row",
            DROPOUT,
            "at = row * columns + 8 * call",
            "at = row * (columns + 1) + 8 * call",
            "emulator",
            "dropout",
        ),
        ("tail left unmasked", DROPOUT, "int(rest < 8 ? rest : 8)", "8", "emulator", "dropout"),
        (
            "vectors where memory isn't aligned",
            DROPOUT,
            "load_floats(x + at, valid, vector, values)",
            "load_floats(x + at, valid, true, values)",
            "emulator",
            "dropout",
        ),
        (
            "halves of a word swapped",
            ELEMENTS,
            "pack<T>(values[2 * i], values[2 * i + 1])",
            "pack<T>(values[2 * i + 1], values[2 * i])",
            "emulator",
            "dropout",
        ),
        ("scale forgotten", DROPOUT, "values[i] * scale", "values[i]", "emulator", "dropout"),
        (
            "slices in another order",
            MASK,
            "words[i / 2] >> (16 * (i % 2))",
            "words[i % 4] >> (16 * (i / 4))",
            "emulator",
            "dropout",
        ),
        ("key without its high word", MASK, "key_high = uint32_t(seed >> 32);", "", "emulator", "dropout"),
        ("counter without its stream", MASK, "c2 = stream", "c2 = 0", "emulator", "dropout"),
        ("counter without its row", MASK, "c1 = row", "c1 = 0", "emulator", "dropout"),
        (
            "a round too few",
            "include/llmbuilder/philox.h",
            "PHILOX_ROUNDS = 7",
            "PHILOX_ROUNDS = 6",
            "emulator",
            "dropout",
        ),
        ("threshold compared with > instead of >=", MASK, ">= threshold", "> threshold", "emulator", "dropout"),
        (
            "sum assigned instead of added",
            EWC,
            "fmaf(weight * g[i], g[i], f[i])",
            "weight * g[i] * g[i]",
            "emulator",
            "ewc",
        ),
    )
    + _bugs(
        "launcher",
        (
            "kernel on the default stream",
            LAUNCH,
            "shared, cudaStream_t(launch.stream)",
            "shared, cudaStream_t()",
            "emulator",
            "dropout",
        ),
        (
            "kernel on the caller's device",
            LAUNCH,
            "error_ == cudaSuccess && before_ != device",
            "error_ != cudaSuccess",
            "emulator",
            "dropout",
        ),
        ("device left changed", LAUNCH, "if (changed_) cudaSetDevice(before_);", "", "emulator", "dropout"),
        (
            "waits for its kernel",
            LAUNCH,
            '"launch", error);\n  return {};',
            '"launch", error);\n  cudaStreamSynchronize(cudaStream_t(launch.stream));\n  return {};',
            "emulator",
            "dropout",
        ),
        (
            "kernel launched twice",
            LAUNCH,
            "void* pointers[] = {&arguments...};",
            "void* pointers[] = {&arguments...};\n"
            "  cudaLaunchKernel(kernel, dim3(unsigned(grid.x), unsigned(grid.y), unsigned(grid.z)), block, pointers,\n"
            "                   shared, cudaStream_t(launch.stream));",
            "emulator",
            "dropout",
        ),
        (
            "blocks of rows taken for blocks of columns",
            GRAD_AX,
            "const Blocks grid(plan.across, plan.slabs.parts);",
            "const Blocks grid(plan.slabs.parts, plan.across);",
            "emulator",
            "lora_grad_ax",
        ),
        (
            "a block of rows too few",
            SHRINK,
            "const Blocks grid(parts_of(a.x.rows, Tile::ROWS), parts,",
            "const Blocks grid((a.x.rows - 1) / Tile::ROWS + (a.x.rows <= Tile::ROWS), parts,",
            "emulator",
            "lora_shrink",
        ),
        (
            "too little shared memory",
            GRAD_AX,
            "Memory<T, Tile>::BYTES, launch, a)",
            "Memory<T, Tile>::BYTES / 2, launch, a)",
            "emulator",
            "lora_grad_ax",
        ),
        (
            "shared memory not opted in to",
            LAUNCH,
            "if (shared > SHARED_WITHOUT_OPT_IN)",
            "if (shared > 2 * SHARED_WITHOUT_OPT_IN)",
            "launcher",
            "lora_grad_ax",
        ),
        (
            "opts in to shared memory in a capture",
            LAUNCH,
            "if (capture != cudaStreamCaptureStatusNone)",
            "if (capture > cudaStreamCaptureStatusActive)",
            "launcher",
            "lora_grad_ax",
        ),
        (
            "error of the runtime lost",
            LAUNCH,
            'return failed(name, "launch", error);',
            "return {};",
            "launcher",
            "dropout",
        ),
        (
            "error of the runtime left for others",
            LAUNCH,
            "cudaGetLastError();  // the error",
            "// the error",
            "launcher",
            "dropout",
        ),
    )
)
