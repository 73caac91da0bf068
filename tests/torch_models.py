"""Golden and random models in the PyTorch module, and the files that it reads, written without our writers."""

import hashlib
import json
import zlib

import numpy as np
import pytest
from safetensors.numpy import load_file

from terdit_jax.interop import published
from terdit_jax.model.config import DiTConfig
from tests.forged_containers import render, seal
from tests.golden_models import GOLDEN, golden_config

torch = pytest.importorskip("torch")

from terdit_jax.interop import pytorch  # noqa: E402


def fields_of(config: DiTConfig) -> dict:
    names = {*pytorch._INTEGERS, *pytorch._FLAGS, *pytorch._OF_TRAINING, *pytorch._ADDED, "positions"}
    return {name: getattr(config, name) for name in names}


def golden_model(name) -> tuple[dict, dict]:
    """(fields, arrays) of a reference model."""
    return fields_of(golden_config(name)), load_file(GOLDEN / f"{name}.safetensors")


def described(fields, **sample_settings) -> dict:
    return {"name": "tiny", "model": fields, "latent_scale": 0.5, "sample": sample_settings}


def as_tensors(arrays) -> dict:
    return {name: torch.tensor(array) for name, array in arrays.items()}


def build(fields, arrays, dtype=torch.float32, packed=True):
    model = pytorch.TerDiT(fields, dtype=dtype, packed=packed)
    model.load_state_dict(as_tensors(arrays), strict=True)
    return model.requires_grad_(False).eval()


def published_arrays(config, params) -> dict:
    """Published names and arrays of our parameters, ternary weights in planes."""
    arrays, fields = dict(published.published_tensors(config, published.params_leaves(params))), fields_of(config)
    for alphas in [name for name in arrays if name.endswith(".alphas")]:
        weight = alphas.removesuffix("alphas") + "weight"
        matrices = 3 if ".qkv." in weight else 1
        arrays[weight] = pytorch._ternary_planes(torch.tensor(arrays[weight]), matrices, fields).numpy()
    return arrays


def write_artifact(path, description, arrays, *, compressed=(), **changes):
    """An artifact as docs/format.md has it, written without our writer; `changes` replace metadata before the seal."""
    stored, entries, offset = {}, {}, 0
    for name in sorted(arrays, key=lambda name: arrays[name].dtype == np.uint8):
        stored[name] = zlib.compress(arrays[name].tobytes()) if name in compressed else arrays[name].tobytes()
        dtype = {"uint8": "U8", "float32": "F32"}[str(arrays[name].dtype)]
        shape = list(arrays[name].shape)
        if name in compressed:
            compressed[name], dtype, shape = [dtype, shape], "U8", [len(stored[name])]
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + len(stored[name])]}
        offset += len(stored[name])
    metadata = {"format": "terdit_jax", "version": "1", "description": json.dumps(description)}
    metadata["sha256"] = json.dumps({name: hashlib.sha256(data).hexdigest() for name, data in stored.items()})
    metadata |= {"zlib": json.dumps(dict(compressed)), "header_sha256": "0" * 64} | changes
    header = json.dumps({"__metadata__": metadata, **entries}).encode()
    path.write_bytes(render(seal(header + b" " * (-len(header) % 8)), b"".join(stored.values())))
    return path
