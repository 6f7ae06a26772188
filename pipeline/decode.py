"""Encoded bytes to augmented images [B, 3, H, W]. The only file that imports DALI.

On a CPU, DALI decodes nothing but the crop and torch resizes it: its uint8 kernel does in 0.3 ms what DALI's cubic
resize does in 1.4. With a GPU, DALI does all of it.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import nvidia.dali
import torch
import torch.nn.functional as F
from jaxtyping import UInt8
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from pipeline.augment import Crops
from pipeline.config import AugmentConfig

Encoded = bytes | memoryview

# DALI's own annotations are partial and in places wrong.
dali: Any = nvidia.dali
fn, types = dali.fn, dali.types


class DecodeError(Exception):
    """Some inputs cannot be decoded: `indices` into the batch, and a reason for each."""

    def __init__(self, indices: list[int], reasons: list[str]) -> None:
        self.indices, self.reasons = indices, reasons
        listed = "; ".join(f"input {index}: {reason}" for index, reason in zip(indices, reasons, strict=True))
        super().__init__(f"{len(indices)} inputs cannot be decoded: {listed}")


def crop_pipeline(*, num_threads: int, max_batch_size: int) -> Any:
    """DALI graph on the CPU: (encoded, start, shape) -> the crop, uint8 [h, w, 3] RGB, and nothing around it.

    Orientation tags are ignored, as in the official recipe, so that boxes are in the stored image's pixels.
    """
    pipe = _pipeline(num_threads, max_batch_size, None)
    with pipe:
        encoded, start, shape = (fn.external_source(name=name) for name in ("encoded", "start", "shape"))
        pipe.set_outputs(
            fn.decoders.image_slice(
                encoded,
                start=start,
                shape=shape,
                axis_names="HW",
                adjust_orientation=False,
                output_type=types.RGB,
            )
        )
    return pipe


def mixed_pipeline(device_id: int | None, *, num_threads: int, max_batch_size: int, image_size: tuple[int, int]) -> Any:
    """DALI graph on a GPU: (encoded, start, shape, flip) -> the augmented image, uint8 [3, H, W] RGB.

    The whole image is decoded, by nvJPEG's CUDA decoder alone: with the hardware decoder beside it a batch is split
    over the two, which differ in the last bit.
    """
    pipe = _pipeline(num_threads, max_batch_size, device_id)
    with pipe:
        encoded, start, shape, flip = (fn.external_source(name=name) for name in ("encoded", "start", "shape", "flip"))
        images = fn.decoders.image(
            encoded, device="mixed", hw_decoder_load=0.0, adjust_orientation=False, output_type=types.RGB
        )
        images = fn.slice(images, start=start, shape=shape, axis_names="HW")
        images = fn.resize(images, size=image_size, interp_type=types.INTERP_CUBIC, antialias=True)
        images = fn.flip(images, horizontal=flip)
        pipe.set_outputs(fn.transpose(images, perm=[2, 0, 1]))
    return pipe


def _pipeline(num_threads: int, max_batch_size: int, device_id: int | None) -> Any:
    # Stateless: one batch in, one batch out. Under the dynamic executor an output keeps its buffer while it is held.
    return dali.Pipeline(
        batch_size=max_batch_size,
        num_threads=num_threads,
        device_id=device_id,
        prefetch_queue_depth=1,
        exec_dynamic=True,
        set_affinity=False,
    )


class Decoder:
    """Decodes, crops, resizes (bicubic with antialias) and flips batches. For one thread at a time.

    Pixels depend on the bytes and boxes alone, not on the number of threads, the batch, or what was decoded before.

    Args:
        config: image_size.
        device: `cpu`, or `mixed` for nvJPEG on a GPU.
        num_threads: threads that decode, and as many again that resize while others decode.
        max_batch_size: images in DALI's hands at a time; larger batches are cut. Bounds the memory for decoded crops
            to two such cuts.
        device_id: the GPU, for `mixed`.
    """

    def __init__(
        self,
        config: AugmentConfig,
        *,
        device: Literal["cpu", "mixed"],
        num_threads: int,
        max_batch_size: int,
        device_id: int | None = None,
    ) -> None:
        self._size = config.image_size
        self._mixed = device == "mixed"
        self._num_threads, self._max_batch_size = num_threads, max_batch_size
        self._device_id = (device_id or 0) if self._mixed else None
        self._pipe = self._build(max_batch_size)
        self._pool = ThreadPoolExecutor(num_threads, "tarmac-resize")
        self._closed = threading.Event()

    def decode(self, encoded: Sequence[Encoded], crops: Crops) -> UInt8[Tensor, "B 3 H W"]:
        """Augmented images, contiguous, on the GPU if `mixed`.

        Args:
            encoded: B files: JPEG, PNG, WebP and whatever else nvImageCodec reads; grey and CMYK become RGB.
            crops: B boxes within the stored images.

        Raises:
            DecodeError: some cannot be decoded, or a box is not within its image; the decoder stays usable.
        """
        device = torch.device(f"cuda:{self._device_id}" if self._mixed else "cpu")
        images = torch.empty((len(encoded), 3, *self._size), dtype=torch.uint8, device=device)
        bad: dict[int, str] = {}
        resizing: list[Future[None]] = []
        for first in range(0, len(encoded), self._max_batch_size):
            if self._closed.is_set():
                raise RuntimeError("the decoder is closed")
            rows = np.arange(first, min(first + self._max_batch_size, len(encoded)))
            try:
                outputs = _run(self._pipe, encoded, crops, rows, flip=self._mixed)
            except RuntimeError as error:
                bad |= self._find_bad(encoded, crops, rows, error)
                continue
            _wait(resizing)  # one cut is resized while the next one is decoded
            if self._mixed:
                _copy_from_dali(outputs, images[first : first + len(rows)])
            else:
                resizing = self._resize(outputs, images.numpy()[rows[0] : rows[-1] + 1], crops.flip[rows])
        _wait(resizing)
        if bad:
            raise DecodeError(list(bad), list(bad.values()))
        return images

    def close(self) -> None:
        """Stop the threads, and whoever is in `decode` on another thread, with a RuntimeError."""
        self._closed.set()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _build(self, max_batch_size: int) -> Any:
        threads = min(self._num_threads, max_batch_size)
        if self._mixed:
            pipe = mixed_pipeline(
                self._device_id, num_threads=threads, max_batch_size=max_batch_size, image_size=self._size
            )
        else:
            pipe = crop_pipeline(num_threads=threads, max_batch_size=max_batch_size)
        pipe.build()
        return pipe

    def _resize(self, outputs: Any, images: npt.NDArray[np.uint8], flip: npt.NDArray[np.bool_]) -> list[Future[None]]:
        """Start resizing DALI's B crops into `images` [B, 3, H, W]."""
        crops = [np.asarray(outputs[row]) for row in range(len(images))]
        turns = itertools.count()

        def work() -> None:
            while (row := next(turns)) < len(images):
                resize_into(images[row], crops[row], flip=bool(flip[row]))

        return [self._pool.submit(work) for _ in range(min(self._num_threads, len(images)))]

    def _find_bad(
        self, encoded: Sequence[Encoded], crops: Crops, rows: npt.NDArray[np.int64], error: RuntimeError
    ) -> dict[int, str]:
        """Decode the rows of a failed run one by one; the indices that fail alone, with their reasons."""
        # A failed pipeline is dead.
        self._pipe = self._build(self._max_batch_size)
        bad, single = {}, self._build(1)
        for row in rows:
            try:
                _run(single, encoded, crops, np.array([row]), flip=self._mixed)
            except RuntimeError as reason:
                bad[int(row)] = _reason(reason)
                single = self._build(1)
        if not bad:
            raise error
        return bad


def resize_into(image: npt.NDArray[np.uint8], crop: npt.NDArray[np.uint8], *, flip: bool) -> None:
    """Resize `crop` [h, w, 3] into `image` [3, H, W], bicubic with antialias, and mirror it if `flip`.

    Within 1 of PIL's bicubic with the horizontal pass first.
    """
    # [1, 3, h, w] in channels_last: the layout that torch's fast uint8 kernel takes, and it stays on this thread.
    pixels = torch.from_numpy(crop).permute(2, 0, 1)[None]
    resized = F.interpolate(pixels, size=image.shape[1:], mode="bicubic", antialias=True)[0].numpy()
    # numpy copies on this thread; torch would hand a copy this large to its own threads, beside the pool's.
    np.copyto(image, resized[:, :, ::-1] if flip else resized)


def _run(pipe: Any, encoded: Sequence[Encoded], crops: Crops, rows: npt.NDArray[np.int64], *, flip: bool) -> Any:
    pipe.feed_input("encoded", [np.frombuffer(encoded[row], np.uint8) for row in rows])
    pipe.feed_input("start", np.stack([crops.top[rows], crops.left[rows]], axis=1).astype(np.int32))
    pipe.feed_input("shape", np.stack([crops.height[rows], crops.width[rows]], axis=1).astype(np.int32))
    if flip:
        pipe.feed_input("flip", crops.flip[rows].astype(np.int32))
    return pipe.run()[0]


def _copy_from_dali(outputs: Any, images: Tensor) -> None:
    images.copy_(from_dlpack(outputs.as_tensor()))
    # DALI may reuse the buffer once `outputs` is dropped.
    torch.cuda.current_stream(images.device).synchronize()


def _wait(futures: list[Future[None]]) -> None:
    for future in futures:
        future.result()


def _reason(error: RuntimeError) -> str:
    """What DALI says between its traceback and its epilogue."""
    text = str(error).rpartition("encountered:")[2]
    for epilogue in ("C++ context", "Current pipeline object"):
        text = text.partition(epilogue)[0]
    text = " ".join(text.split())
    if "nvImageCodec failure: '#4'" in text:
        return "not an image, or in a format that is not supported"
    if text.startswith("Failed to decode"):
        return "damaged, or in a variant of its format that is not supported"
    return text or "cannot be decoded"
