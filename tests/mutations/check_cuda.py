"""One rung of the ladder over one operator of a tree of sources: python check_cuda.py RUNG CSRC OPERATOR

Exits with 0 when nothing was seen, with 1 and the reason when something was, and with 2 when the rung could not run.
"""

import sys
import traceback
from contextlib import suppress
from pathlib import Path

import torch
from codegen import nvcc, sass
from gpusim import sanitize
from gpusim.build import build
from gpusim.harness import Emulator
from ptx.device import device
from ptx.operators import Case, draw

from llmbuilder.ops import _cuda, reference

SEEDS = range(1, 9)


class SeenError(Exception):
    """What a rung says of a bug."""


def cache(csrc: Path) -> Path:
    """Objects of the copies lie beside them, so that what a bug leaves alone is compiled once."""
    return csrc.parents[1] / "emulated"


def main() -> int:
    rung, csrc, operator = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
    try:
        run = prepare(rung, csrc, operator)
    except Exception:
        traceback.print_exc()
        return 2
    try:
        run()
    except Exception as error:
        print(f"{type(error).__name__}: {error}".split("\n")[0])
        return 1
    return 0


def prepare(rung: str, csrc: Path, operator: str):
    """Compiles; what is returned runs."""
    sources = [csrc / "bindings.cpp", csrc / "cuda" / f"{operator}.cu"]
    if rung in ("emulator", "schedules", "counts", "launcher"):
        emulator = Emulator(build(sources, csrc=csrc, cache=cache(csrc)))
        if rung == "launcher":
            return lambda: launched(emulator, operator)
        if rung == "counts":
            return lambda: counted(emulator, operator)
        return lambda: emulated(emulator, operator, SEEDS if rung == "schedules" else [0])
    if rung in ("asan", "tsan"):
        library = build(csrc=csrc, variant=rung, cache=cache(csrc))  # calls.py asks all launchers for their workspaces
        return lambda: sanitized(rung, library, operator)
    if rung == "ptx":
        gpu = device(csrc, operator)
        return lambda: interpreted(gpu, operator)
    if rung == "codegen":
        kernels = sass.kernels(nvcc.cubin(sources[1], 80))
        return lambda: gated(kernels)
    raise ValueError(f"no such rung: {rung}")


def emulated(emulator, operator, seeds) -> None:
    with emulator.serving():
        for seed in seeds:
            emulator.schedule(seed)
            check(operator)


def counted(emulator, operator) -> None:
    """Bank conflicts of ldmatrix on whole tiles."""
    drawn = draw(Case(operator, torch.bfloat16, 128, 128, 128, 32))
    with emulator.serving(), emulator.recording() as launches:
        drawn.call(_cuda)
    if conflicts := sum(launch.ldmatrix_conflicts for launch in launches):
        raise SeenError(f"{conflicts} bank conflicts of ldmatrix")


def launched(emulator, operator) -> None:
    """The launcher captured before it was called at all, called, captured, and with a runtime that fails."""
    drawn, recorder = draw(Case(operator, torch.bfloat16, 128, 128, 128, 200)), emulator.recorder
    with emulator.serving():
        with emulator.capturing(), suppress(ValueError):  # "call it once before capturing"
            drawn.call(_cuda)
        drawn.call(_cuda)
        with emulator.capturing():
            drawn.call(_cuda)
        recorder.fail("cudaLaunchKernel", 701)
        with suppress(RuntimeError):
            drawn.call(_cuda)
            raise SeenError("an error of the runtime is lost")
        if recorder.last_error():
            raise SeenError("an error of the runtime is left for others")


def interpreted(gpu, operator) -> None:
    with gpu.interpreting(seed=3):
        check(operator)


def sanitized(variant, library, operator) -> None:
    done = sanitize.python(variant, str(Path(__file__).with_name("call_cuda.py")), library, operator, *SEEDS)
    if done.returncode:
        lines = [line for line in (done.stdout + done.stderr).splitlines() if "WARNING:" in line or "ERROR:" in line]
        raise SeenError(lines[0] if lines else f"ended with {done.returncode}: {done.stderr[-300:]}")


def gated(kernels) -> None:
    for kernel in kernels:
        if kernel.stack + kernel.local + kernel.count("STL|LDL"):
            raise SeenError(f"{kernel.stack} bytes of stack, {kernel.count('STL|LDL')} accesses to local memory")


def check(operator: str) -> None:
    """Results on small shapes with tails, by the rule for errors."""
    torch.manual_seed(0)
    if operator == "ewc":
        check_ewc()
    elif operator == "cross_entropy":
        check_cross_entropy()
    else:
        check_matrices(operator)
    if operator == "dropout":
        check_mask()


def check_matrices(operator: str) -> None:
    for M, N, K, r, sliced in [(70, 40, 136, 5, False), (37, 290, 71, 24, True), (33, 48, 64, 40, False)]:
        drawn = draw(Case(operator, torch.bfloat16, M, N, K, r, threshold=6554, sliced=sliced))
        for out, plain, exact in zip(drawn.call(_cuda), drawn.plain, drawn.exact, strict=True):
            error, allowed = ((t.double() - exact).abs().max().item() for t in (out, plain))
            unit = torch.finfo(torch.bfloat16).eps * exact.abs().max().item()
            if not error <= 2 * allowed + unit:
                raise SeenError(f"off by {error:.2e}, torch by {allowed:.2e}")


def check_mask() -> None:
    ones, seed = torch.ones(256, 1024), torch.tensor(0x1_2345_6789)
    keep = _cuda.dropout_mask(ones.shape, 20000, seed, 3)
    if not torch.equal(keep, reference.dropout(ones, 20000, seed, 3) != 0):
        raise SeenError("bits of the mask differ from the reference's")


def check_ewc() -> None:
    parameters, anchors, fishers, grads = (
        [torch.rand(size).bfloat16() for size in (16384, 3, 40001, 64)] for _ in range(4)
    )
    results = []
    for module in (reference, _cuda):
        mine, own = [p.clone().requires_grad_() for p in parameters], [f.clone() for f in fishers]
        for parameter, grad in zip(mine, grads, strict=True):
            parameter.grad = grad.clone()
        value = module.ewc_penalty_(mine, anchors, own, 2.0)
        module.ewc_accumulate_(own, grads, 0.5)
        results.append((float(value), torch.cat([p.grad for p in mine]).double(), torch.cat(own).double()))
    (value, grad, fisher), (value_now, grad_now, fisher_now) = results
    if not abs(value - value_now) <= 1e-5 * value:
        raise SeenError(f"the penalty is {value_now}, expected {value}")
    for name, now, right in (("gradients", grad_now, grad), ("Fisher values", fisher_now, fisher)):
        if not (now - right).abs().max() <= 0.02:
            raise SeenError(f"{name} are off by {(now - right).abs().max():.2e}")


def check_cross_entropy() -> None:
    for columns in (77, 640):
        logits, targets = torch.randn(3, columns).bfloat16() * 4, torch.tensor([columns - 1, 0, 5])
        losses, _ = _cuda.softmax_cross_entropy_(logits.clone(), targets, None, 0.0, True)
        expected = torch.nn.functional.cross_entropy(logits.double(), targets, reduction="none")
        if not (losses.double() - expected).abs().max() < 1e-4:
            raise SeenError(f"losses are off by {(losses.double() - expected).abs().max():.2e}")


if __name__ == "__main__":
    sys.exit(main())
