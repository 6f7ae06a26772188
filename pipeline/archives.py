"""Images inside of tars: those of one tar, of many, and of a tar of tars."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from pipeline.components import list_components
from pipeline.errors import SourceError
from pipeline.listing import Listing, SampleRef, SourceFile, is_hidden, is_image, list_images, printable
from pipeline.store import Store
from pipeline.tar_members import tar_members, unreadable

NUM_TARS_AT_ONCE = 8

# A WordNet id: ImageNet's tars are named after the class that each holds.
_SYNSET = re.compile(r"n\d{8}")


def is_tar(path: str) -> bool:
    """Whether a file is a tar, by its name."""
    return path.lower().endswith(".tar") and not is_hidden(path)


def list_tars(store: Store, names: Sequence[str], where: str) -> Listing:
    """List the images of one tar, or of several; labels are from `.cls` files, or from folders.

    Raises:
        SourceError: a tar is damaged, there are no images, or their layout is unclear; `where` names the source.
        StoreError: the store does not answer or refuses us.
    """
    with ThreadPoolExecutor(NUM_TARS_AT_ONCE) as threads:
        found = threads.map(lambda name: _files(store, name), names)
        if len(names) == 1:
            files = next(found)
        else:
            files = [file._replace(archive=name) for name, of_tar in zip(names, found, strict=True) for file in of_tar]
    labelled = list_components(files, where)
    if labelled is not None:
        return labelled
    if len(names) > 1 and all(_SYNSET.fullmatch(_stem(name)) for name in names):
        files = [file._replace(path=f"{_stem(file.archive)}/{file.path}") for file in files]
    return list_images(files, where)


def read_member(store: Store, name: str, ref: SampleRef) -> bytes:
    """The bytes of one image in the tar `name`.

    Raises:
        OSError: there is nothing to read: it is a link that leads nowhere, or stored sparse.
        StoreError: the tar is gone, refused, or does not come.
    """
    if (error := unreadable(ref.offset)) is not None:
        raise error
    return store.read_range(name, ref.offset, ref.num_bytes)


def _files(store: Store, name: str) -> list[SourceFile]:
    """What a tar holds. If that is tars, what these hold, each in a folder with its name."""
    # A header is skipped to on local disk; in a bucket a jump costs more than the bytes jumped over.
    block_bytes = 2**23 if "://" in store.url else 2**16
    files = list(tar_members(store, name, block_bytes))
    tars = sorted(file for file in files if is_tar(file.path))
    if not tars:
        return files
    image = next((file.path for file in files if is_image(file.path)), None)
    if image is not None:
        raise mixed_error(f"{store}/{name}", image, tars[0].path)
    with ThreadPoolExecutor(NUM_TARS_AT_ONCE) as threads:
        inner = threads.map(lambda tar: _inner_files(store, name, tar, block_bytes), tars)
        return [file for file in files if not is_tar(file.path)] + [file for of_tar in inner for file in of_tar]


def _inner_files(store: Store, name: str, tar: SourceFile, block_bytes: int) -> list[SourceFile]:
    """What a tar inside of another one holds; offsets are in the outer one."""
    if (error := unreadable(tar.offset)) is not None:
        raise SourceError(f"{store}/{name}: {printable(tar.path)} is {error.strerror}")
    files = tar_members(store, name, block_bytes, tar.offset)
    return [file._replace(path=f"{_stem(tar.path)}/{file.path}") for file in files]


def mixed_error(where: str, image: str, archive: str) -> SourceError:
    """What to raise where images and archives lie side by side."""
    return SourceError(
        f"{where} holds both images ({printable(image)}) and tars ({printable(archive)}), so it is unclear which "
        f"are meant; move the others away, or give a folder of the ones"
    )


def _stem(path: str) -> str:
    return os.path.splitext(os.path.basename(path))[0]
