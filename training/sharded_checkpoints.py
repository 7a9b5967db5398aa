"""Checkpoints of a sharded run: a folder in which every process writes its shards (PyTorch's DCP).

    checkpoints/last.ckpt -> last-500          a link, replaced when what it points to is whole
    checkpoints/last-500/rest.pt               what is no shard: steps, callbacks, configuration
    checkpoints/last-500/__0_0.distcp, ...     shards of weights, optimizer and averages
    checkpoints/last-500/.metadata             where in the files they are

Shards are copied to the host first, then written beside the training that goes on. What is read has
the structure of a checkpoint in one file: with shards for any number of processes, or with whole
tensors for one process that does not shard.

A folder is data, as a file is: tensors are read with ``weights_only``, and the pickle that DCP
keeps its index in may name the classes of an index and nothing else.
"""

import os
import pickle
import shutil
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.distributed.tensor import DTensor, distribute_tensor

REST, INDEX = "rest.pt", ".metadata"
MARK = "in shards"  # stands in ``rest`` for a tensor that is in the shards
Key = tuple[str | int, ...]  # where in a checkpoint something is
Layout = Callable[[Key], torch.Tensor | None]

# What DCP's index is made of.
INDEX_CLASSES = {
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    *(
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    ),
}


def is_sharded_checkpoint(path: Path) -> bool:
    return path.is_dir() and (path / REST).is_file()


class Writer:
    """Writes one checkpoint at a time, while the training goes on.

    A process group of its own keeps its messages apart from those of the training.
    """

    def __init__(self) -> None:
        self.group: Any = distributed.new_group(backend="gloo")
        self.pending: Future | None = None

    def save(
        self,
        checkpoint: dict[str, Any],
        path: Path,
        save_rest: Callable[[dict[str, Any], Path], None],
    ) -> None:
        """Returns when the shards are on the host. ``path`` is one in all processes, and
        ``save_rest(rest, file)`` writes what is no shard.
        """
        self.wait()
        shards: dict[str, Any] = {}

        def apart(key: Key, x: Any) -> Any:
            if not isinstance(x, DTensor):
                return x
            # On a CPU a copy that is written later would be the tensor itself.
            shards[_joined(key)] = x.detach().clone() if x.device.type == "cpu" else x.detach()
            return MARK

        rest = mapped(apart, checkpoint)
        name = f"{path.stem}-{checkpoint['global_step']}"
        folder, first = path.with_name(f".{name}.tmp"), distributed.get_rank() == 0
        if first:
            shutil.rmtree(folder, ignore_errors=True)  # of a killed write
            folder.mkdir(parents=True)
            save_rest(rest, folder / REST)
        distributed.barrier(self.group)
        response: Any = async_save(
            shards, storage_writer=FileSystemWriter(folder), process_group=self.group
        )
        written = getattr(response, "upload_completion", response)
        self.pending = _after(written, lambda: _finish(folder, path, name)) if first else written

    def wait(self) -> None:
        """Until what was saved last can be read; raises what went wrong with it."""
        if self.pending is not None:
            pending, self.pending = self.pending, None
            pending.result()


def _after(written: Future, work: Callable[[], None]) -> Future:
    """Done when ``work`` is, which follows ``written`` in the same thread."""
    done: Future = Future()

    def act(written: Future) -> None:
        try:
            written.result()
            work()
        except BaseException as error:  # whoever waits is told
            done.set_exception(error)
        else:
            done.set_result(None)

    written.add_done_callback(act)
    return done


def _finish(folder: Path, path: Path, name: str) -> None:
    """All shards are written: give the folder its name, then let the link point to it."""
    before = path.resolve() if path.is_symlink() else None
    final = path.with_name(name)
    while final.exists():
        final = final.with_name(f"{final.name}+")
    sync_folder(folder)
    folder.rename(final)
    link = path.with_name(f".{path.name}.tmp")
    link.unlink(missing_ok=True)
    link.symlink_to(final.name)
    link.replace(path)
    sync_folder(path.parent)
    remove_shards(before)


def remove_shards(folder: Path | None) -> None:
    """Of a link that points elsewhere by now, unless another one points there."""
    if folder is None or not is_sharded_checkpoint(folder):
        return
    links = [path for path in folder.parent.iterdir() if path.is_symlink()]
    if all(path.resolve() != folder for path in links):
        shutil.rmtree(folder, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """What was renamed in it reaches the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read(path: Path, rest: dict[str, Any], layout: Layout = lambda key: None) -> dict[str, Any]:
    """The checkpoint in the folder at ``path``, on the CPU.

    Args:
        rest: what ``rest.pt`` holds.
        layout: a tensor that is sharded as the one at this place shall be; None is whole.

    Raises:
        ValueError: the folder is not whole, or is no checkpoint.
    """
    reader = Reader(path)
    index = reader.index()
    tensors: dict[str, Any] = {}

    def allocated(key: Key, x: Any) -> Any:
        if not isinstance(x, str) or x != MARK:
            return x
        found = index.get(_joined(key))
        if not isinstance(found, TensorStorageMetadata):
            raise ValueError(f"ckpt: {path} is not whole: it has no {_joined(key)}")
        like = layout(key)
        if like is None:
            tensor = torch.empty(found.size, dtype=found.properties.dtype)
        elif like.shape == found.size:
            tensor = torch.empty_like(like, dtype=found.properties.dtype)
        else:
            raise ValueError(
                f"ckpt: {path} holds another network than the one configured: {_joined(key)} is"
                f" {tuple(found.size)} there and {tuple(like.shape)} here"
            )
        tensors[_joined(key)] = tensor
        return tensor

    checkpoint = mapped(allocated, rest)
    try:
        load(tensors, storage_reader=reader, planner=Planner(), no_dist=True)
    except CheckpointException as error:
        cause = next(iter(error.failures.values()))[0]
        raise ValueError(f"ckpt: {path} is not a readable checkpoint ({cause})") from error
    return checkpoint


def distributed_as(checkpoint: dict[str, Any], layout: Layout) -> dict[str, Any]:
    """A checkpoint of whole tensors with those in shards that ``layout`` says."""

    def shared(key: Key, x: Any) -> Any:
        like = layout(key) if isinstance(x, torch.Tensor) and x.dim() else None
        if not isinstance(like, DTensor) or x.shape != like.shape:
            return x
        x = x.to(like.device)
        return distribute_tensor(x, like.device_mesh, like.placements, src_data_rank=None)

    return mapped(shared, checkpoint)


class Planner(DefaultLoadPlanner):
    """Loads tensors only."""

    def load_bytes(self, read_item: Any, value: Any) -> None:
        raise ValueError(f"{read_item.dest_index.fqn} is no tensor")


class Reader(FileSystemReader):
    """Reads DCP's index without letting it name anything but the classes of an index."""

    def index(self) -> dict[str, Any]:
        return self.read_metadata().state_dict_metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        path = Path(self.path)
        try:
            with (path / INDEX).open("rb") as file:
                metadata = IndexUnpickler(file).load()
        except Exception as error:
            raise ValueError(f"ckpt: {path} has no readable index ({error})") from error
        places = metadata.storage_data if isinstance(metadata, Metadata) else None
        if not isinstance(places, dict):
            raise ValueError(f"ckpt: {path} has an index of something else")
        if outside := [p for p in places.values() if Path(p.relative_path).name != p.relative_path]:
            raise ValueError(f"ckpt: {path} says that shards are at {outside[0].relative_path}")
        return metadata


class IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if dtype or (module, name) in INDEX_CLASSES:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def mapped(f: Callable[[Key, Any], Any], x: Any, key: Key = ()) -> Any:
    """A tree of dictionaries, lists and tuples with f(key, leaf) in place of each leaf. What a
    dictionary has beside its items it keeps, as a state_dict its _metadata.
    """
    if isinstance(x, dict):
        y = type(x)()
        y.update((name, mapped(f, inner, (*key, name))) for name, inner in x.items())
        if beside := getattr(x, "__dict__", None):
            y.__dict__.update(mapped(f, beside, key))
        return y
    if isinstance(x, list | tuple):
        items = [mapped(f, inner, (*key, i)) for i, inner in enumerate(x)]
        return type(x)(*items) if hasattr(x, "_fields") else type(x)(items)
    return f(key, x)


def _joined(key: Key) -> str:
    return "/".join(map(str, key))
