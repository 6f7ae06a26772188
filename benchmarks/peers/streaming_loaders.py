"""The two libraries with formats of their own: mosaicml-streaming (MDS) and litdata."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from PIL import Image

from benchmarks.peers.contender import Data, Epoch
from benchmarks.peers.torch_loaders import pil_transform, resumed, sizes, v2_transform


def write_mds(images: list[tuple[str, int]], folder: str, _: int) -> None:
    """(path, label) pairs to MDS shards with the `jpeg` encoding, which keeps the files' bytes. One process."""
    from streaming import MDSWriter

    with MDSWriter(out=folder, columns={"image": "jpeg", "label": "int"}) as writer:
        for path, label in images:
            with Image.open(path) as image:
                writer.write({"image": image, "label": label})


def write_litdata(images: list[tuple[str, int]], folder: str, num_workers: int) -> None:
    """(path, label) pairs to litdata chunks; its JPEG serializer keeps the files' bytes."""
    import litdata

    litdata.optimize(
        fn=litdata_sample, inputs=images, output_dir=folder, num_workers=num_workers, chunk_bytes="64MB", verbose=False
    )


def litdata_sample(item: tuple[str, int]) -> dict[str, Any]:
    """A sample as litdata's docs make it."""
    return {"image": Image.open(item[0]), "label": item[1]}


def mosaic(data: Data) -> Epoch:
    """StreamingDataset with a torchvision transform on PIL images, as its vision datasets do."""
    return sizes(_mosaic_loader(data))


def mosaic_first_batch(data: Data, batch: int) -> Callable[[], object]:
    """StreamingDataLoader's own state."""
    return resumed(lambda: _mosaic_loader(data), batch)


def litdata_epoch(data: Data) -> Epoch:
    """StreamingDataset, whose JPEGs come as tensors, with v2 transforms."""
    return sizes(_litdata_loader(data))


def litdata_first_batch(data: Data, batch: int) -> Callable[[], object]:
    """litdata's StreamingDataLoader's own state."""
    return resumed(lambda: _litdata_loader(data), batch)


def _mosaic_loader(data: Data) -> Any:
    from streaming import StreamingDataLoader, StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    class Images(StreamingDataset):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__(local=data.mds, shuffle=True, batch_size=data.batch_size)
            self.transform = pil_transform()

        def __getitem__(self, at: int) -> tuple[Any, int]:
            sample = super().__getitem__(at)
            return self.transform(sample["image"].convert("RGB")), sample["label"]

    clean_stale_shared_memory()
    return StreamingDataLoader(
        Images(), batch_size=data.batch_size, num_workers=data.num_cpus, drop_last=True, persistent_workers=True
    )


def _litdata_loader(data: Data) -> Any:
    import litdata

    os.environ.setdefault("DISABLE_VERSION_CHECK", "1")
    transform = v2_transform(normalized=True)

    def augment(sample: dict[str, Any]) -> tuple[Any, int]:
        return transform(sample["image"]), sample["label"]

    dataset = litdata.StreamingDataset(data.litdata, shuffle=True, drop_last=True, transform=augment)
    return litdata.StreamingDataLoader(
        dataset, batch_size=data.batch_size, num_workers=data.num_cpus, drop_last=True, persistent_workers=True
    )
