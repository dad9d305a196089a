"""python tests/gpusim/probe.py LIBRARY INDEX BUG: runs a kernel of probes.cu, for its tests with sanitizers."""

import ctypes
import sys

library, index, bug = ctypes.CDLL(sys.argv[1]), int(sys.argv[2]), bool(int(sys.argv[3]))
library.probe.restype = ctypes.c_char_p
source, target = (ctypes.create_string_buffer(512) for _ in range(2))
for seed in range(8):
    library.gpusim_seed(ctypes.c_uint64(seed))
    if message := library.probe(index, bug, source, target):
        sys.exit(message)
