"""IDX files as MNIST and its relatives are distributed."""

import gzip
import struct

import numpy as np


def write_idx(folder, name, values, zipped):
    head = struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape)
    content = head + values.astype(np.uint8).tobytes()
    path = folder / (f"{name}.gz" if zipped else name)
    path.write_bytes(gzip.compress(content) if zipped else content)
    return path
