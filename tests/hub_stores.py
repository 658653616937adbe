"""Stores on a fake Hub: where tests publish them, copies of a store with changes, and commands that are killed."""

import os
import signal
import subprocess
import time
from dataclasses import replace

import numpy as np

import zpipe
from zpipe.pipeline.hub import HubDataset
from zpipe.pipeline.save_tensors import save_tensors
from zpipe.pipeline.verify import verify_store
from zpipe.schemas.manifest import read_manifest, write_extraction, write_manifest
from zpipe.schemas.relevance_store import IndexFile, index_path, read_stored, write_shard

ADDRESS = "hf://datasets/me/maps"
DATASET = HubDataset(name="me/maps")
SHAPES = {"map": (3, 2), "class-maps": (3, 2, 2), "features": (2, 3, 5), "label-map": (4, 4), "vector": (7,)}
TOKEN = "hf_canaryCANARYcanary"


def of_shards(files):
    return {name: data for name, data in files.items() if name.startswith(("maps/", "index/"))}


def saved(shards, folder, kind, shape=None):
    """A store of any tensors, which differ from sample to sample."""
    shape = shape or SHAPES[kind]

    def tensor(sample):
        values = np.arange(1, np.prod(shape) + 1) * (sample.label + 1) + len(sample.image)
        return values.reshape(shape) if kind == "label-map" else values.reshape(shape) / 7

    save_tensors(shards, folder, tensor, name=kind, kind=kind, shape=shape)
    return folder


def with_logits(shards, store):
    """Put stores of other tensors into a store, where an extraction puts them."""
    for name, kind in (("logits", "vector"), ("features", "features")):
        saved(shards, store / name, kind)
    return store


def damaged(data):
    return data[:-1] + bytes([data[-1] ^ 1])


def copied(store, folder, *, stems=None, **changes):
    """A copy of a store with the first shards alone, or with another provenance, written anew and whole."""
    manifest = read_manifest(store)
    maps = zpipe.open_maps(store)
    provenance = replace(manifest.provenance, **changes)
    shards, statuses = [], {}
    for shard in manifest.shards:
        if stems is None or shard.stem in stems:
            index = maps.index(shard.stem).replace_schema_metadata(None)
            seal = {"input_sha256": shard.input_sha256, "fingerprint": provenance.fingerprint()}
            write_shard(folder, shard.stem, read_stored(store, shard.stem), index, **seal)
            shards.append(replace(shard, index_sha256=IndexFile(index_path(folder, shard.stem)).sha256))
            for status in index["status"].to_pylist():
                statuses[status] = statuses.get(status, 0) + 1
    write_extraction(folder, provenance)
    write_manifest(folder, replace(manifest, provenance=provenance, shards=tuple(shards), statuses=statuses))
    assert verify_store(folder) == []
    return folder


def started(command, served, *arguments):
    environment = os.environ | served.environment()
    return subprocess.Popen(command(*arguments), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def killed_when(running, condition):
    end = time.monotonic() + 60
    while not condition() and running.poll() is None and time.monotonic() < end:
        time.sleep(0.002)
    running.send_signal(signal.SIGKILL)
    assert running.wait(10) == -signal.SIGKILL
