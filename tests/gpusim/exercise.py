"""Makes every call of calls.py with a library that ``build`` made, under several schedules; run by its tests with a
sanitizer's runtime preloaded, which ends the process where it sees something.

    python tests/gpusim/exercise.py LIBRARY SEED...
"""

import ctypes
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from gpusim.build import load
from gpusim.calls import Memory, calls


def main() -> None:
    path, seeds = sys.argv[1], [int(seed) for seed in sys.argv[2:]]
    module = load(Path(path))
    library = ctypes.CDLL(path)
    library.gpusim_register.argtypes = [ctypes.c_char_p, *[ctypes.c_uint64] * 4]
    results = []
    for seed in seeds:
        library.gpusim_seed(ctypes.c_uint64(seed))
        library.gpusim_forget()
        memory = Memory(library.gpusim_register)
        for call in calls(module, memory):
            print(seed, call.name, flush=True)
            call.launch(0, 0)
        results.append(memory.contents())
    if any(result != results[0] for result in results):
        sys.exit("results depend on the schedule")


if __name__ == "__main__":
    main()
