"""Calls one operator's launchers for bf16, without torch, for a sanitizer to watch.

python call_cuda.py LIBRARY OPERATOR SEED...
"""

import ctypes
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from gpusim.build import load
from gpusim.calls import Memory, calls

NAMES = {"ewc": "ewc_", "cross_entropy": "softmax_"}


def main() -> None:
    path, operator, *seeds = sys.argv[1:]
    module = load(Path(path))
    library = ctypes.CDLL(path)
    library.gpusim_register.argtypes = [ctypes.c_char_p, *[ctypes.c_uint64] * 4]
    for seed in map(int, seeds):
        library.gpusim_seed(ctypes.c_uint64(seed))
        library.gpusim_forget()
        for call in calls(module, Memory(library.gpusim_register)):
            if call.name.startswith(NAMES.get(operator, operator)) and "bf16" in call.name:
                call.launch(0, 0)


if __name__ == "__main__":
    main()
