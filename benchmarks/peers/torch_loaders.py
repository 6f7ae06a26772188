"""torchvision's image folder behind torch's DataLoader, and webdataset, all with torchvision's transforms."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import webdataset
from torch.utils.data import DataLoader
from torchvision import datasets, io, transforms
from torchvision.transforms import v2

from benchmarks.peers.contender import Data, Epoch

SIZE = 224
SCALE = (0.2, 1.0)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def pil_transform() -> Any:
    """The official MAE recipe's, on PIL images. PIL's filters are always antialiased."""
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(SIZE, scale=SCALE, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )


def v2_transform(*, normalized: bool) -> Any:
    """The v2 transforms on uint8 tensors, as torchvision's docs arrange them."""
    crop = v2.RandomResizedCrop(SIZE, scale=SCALE, interpolation=v2.InterpolationMode.BICUBIC, antialias=True)
    last = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)] if normalized else []
    return v2.Compose([crop, v2.RandomHorizontalFlip(), *last])


def decode(data: bytes) -> torch.Tensor:
    """A JPEG as uint8 [3, H, W] RGB."""
    image: torch.Tensor = io.decode_jpeg(
        torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=io.ImageReadMode.RGB
    )
    return image


def read_and_decode(path: str) -> torch.Tensor:
    """The same of a file."""
    image: torch.Tensor = io.decode_jpeg(io.read_file(path), mode=io.ImageReadMode.RGB)
    return image


def sizes(loader: Any) -> Epoch:
    """An Epoch of a loader of (images, labels)."""

    def epoch() -> Iterator[int]:
        for images, _ in loader:
            yield len(images)

    return epoch


def endless_sizes(loader: Any, data: Data) -> Epoch:
    """An Epoch of a loader of (images, labels) that never ends."""
    batches = iter(loader)

    def epoch() -> Iterator[int]:
        for _ in range(data.num_batches):
            yield len(next(batches)[0])

    return epoch


def pil_folder(data: Data) -> Epoch:
    """ImageFolder with its default PIL loader."""
    return sizes(_loader(DataLoader, datasets.ImageFolder(data.folder, pil_transform()), data))


def v2_folder(data: Data) -> Epoch:
    """ImageFolder with decode_jpeg and v2 transforms to normalised floats."""
    return sizes(_loader(DataLoader, _tensor_folder(data, normalized=True), data))


def v2_folder_uint8(data: Data) -> Epoch:
    """The same, left as uint8."""
    return sizes(_loader(DataLoader, _tensor_folder(data, normalized=False), data))


def stateful_first_batch(data: Data, batch: int) -> Callable[[], object]:
    """torchdata's StatefulDataLoader over the PIL folder."""
    from torchdata.stateful_dataloader import StatefulDataLoader

    dataset = _tensor_folder(data, normalized=True)
    return resumed(lambda: _loader(StatefulDataLoader, dataset, data), batch)


def resumed(make: Callable[[], Any], batch: int) -> Callable[[], object]:
    """What makes a loader, gives it the state of one that stopped after `batch` batches, and takes the next one."""
    state = None
    if batch:
        loader = make()
        batches = iter(loader)
        for _ in range(batch):
            next(batches)
        state = loader.state_dict()
        del batches, loader

    def first() -> object:
        loader = make()
        if state is not None:
            loader.load_state_dict(state)
        batches = iter(loader)
        next(batches)
        return batches

    return first


def webdataset_tars(data: Data) -> Epoch:
    """webdataset over the shards: shuffle buffer of 1,000, decode_jpeg, v2 transforms, batches made in the workers."""
    tars = webdataset.WebDataset(data.tars(), resampled=True, shardshuffle=False).shuffle(1000)
    return endless_sizes(_web_loader(tars, data), data)


def webdataset_first_batch(data: Data, batch: int) -> Callable[[], object]:
    """webdataset has no state: each worker skips what it delivered before, without decoding it."""
    skipped = batch * data.batch_size // data.num_cpus

    def first() -> object:
        tars = webdataset.WebDataset(data.tars(), shardshuffle=False).slice(skipped, None)
        batches = iter(_web_loader(tars, data))
        next(batches)
        return batches

    return first


def _web_loader(tars: Any, data: Data) -> Any:
    transform = v2_transform(normalized=True)
    samples = tars.to_tuple("jpg;jpeg", "cls").map_tuple(lambda image: transform(decode(image)), int)
    return webdataset.WebLoader(samples.batched(data.batch_size), batch_size=None, num_workers=data.num_cpus)


def _tensor_folder(data: Data, *, normalized: bool) -> Any:
    return datasets.ImageFolder(data.folder, v2_transform(normalized=normalized), loader=read_and_decode)


def _loader(kind: Any, dataset: Any, data: Data) -> Any:
    return kind(
        dataset,
        batch_size=data.batch_size,
        shuffle=True,
        num_workers=data.num_cpus,
        drop_last=True,
        persistent_workers=True,
    )
