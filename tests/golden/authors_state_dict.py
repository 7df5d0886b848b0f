"""A state dict with the keys and shapes of the checkpoint that the DiGA authors release.

authors_state_dict("authors_student_keys.json") has those of `student.pth`. The values are random,
drawn for each key from numpy's legacy RandomState: the same on every machine and in every version.
"""

import json
import zlib
from pathlib import Path

import numpy as np
import torch


def authors_state_dict(keys_json, salt=""):
    with Path(keys_json).open() as f:
        shapes = json.load(f)
    state = {}
    for key, shape in shapes.items():
        rng = np.random.RandomState(zlib.crc32((salt + key).encode()))
        if key.endswith("num_batches_tracked"):
            value = np.zeros(shape, np.int64)
        elif key.endswith("running_var"):
            value = rng.uniform(0.5, 1.5, shape)
        elif key.endswith("running_mean"):
            value = rng.uniform(-0.1, 0.1, shape)
        elif len(shape) == 1 and key.endswith("weight"):  # affine scale of a norm layer
            value = rng.uniform(0.4, 0.8, shape)
        elif len(shape) == 1:  # biases
            value = rng.uniform(-0.1, 0.1, shape)
        else:  # conv and linear weights, He-scaled
            value = rng.standard_normal(shape) * np.sqrt(2.0 / np.prod(shape[1:]))
        dtype = np.int64 if value.dtype == np.int64 else np.float32
        state[key] = torch.from_numpy(np.asarray(value, dtype))
    return state
