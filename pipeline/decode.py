"""Encoded bytes to augmented images [B, 3, H, W]. The only file that imports DALI.

On CPUs each thread has a DALI pipeline of its own, which decodes nothing but the crops of some images; torch then
resizes them on the same thread: its uint8 kernel does in 0.1 ms what DALI's cubic resize does in 1.4. So no thread
waits for another, and none waits between two batches. With a GPU, DALI does all of it.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import fields
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import nvidia.dali
import torch
import torch.nn.functional as F
from jaxtyping import UInt8
from threadpoolctl import ThreadpoolController
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from pipeline.augment import Crops
from pipeline.config import AugmentConfig

Encoded = bytes | memoryview

# Images that a pipeline takes at a time: fewer pay too often DALI's 0.2 ms a run, and waits for the interpreter's lock.
MAX_BATCH_SIZE = 32

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


def mixed_pipeline(
    device_id: int | None,
    *,
    num_threads: int,
    max_batch_size: int,
    image_size: tuple[int, int],
    crops_per_image: int = 1,
) -> Any:
    """DALI graph on a GPU: (encoded, and per crop start, shape, flip) -> the crops, each uint8 [H, W, 3] RGB.

    The whole image is decoded, by nvJPEG's CUDA decoder alone: with the hardware decoder beside it a batch is split
    over the two, which differ in the last bit.
    """
    pipe = _pipeline(num_threads, max_batch_size, device_id)
    with pipe:
        encoded = fn.external_source(name="encoded")
        whole = fn.decoders.image(
            encoded, device="mixed", hw_decoder_load=0.0, adjust_orientation=False, output_type=types.RGB
        )
        outputs = []
        for number in range(crops_per_image):
            start, shape, flip = (fn.external_source(name=f"{name}{number}") for name in ("start", "shape", "flip"))
            images = fn.slice(whole, start=start, shape=shape, axis_names="HW")
            images = fn.resize(images, size=image_size, interp_type=types.INTERP_CUBIC, antialias=True)
            outputs.append(fn.flip(images, horizontal=flip))
        pipe.set_outputs(*outputs)
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


class Decoding:
    """A batch on its way: `images` [B, 3, H, W] is whole when `wait` has returned."""

    def __init__(self, images: UInt8[Tensor, "B 3 H W"], parts: list[Future[dict[int, str]]]) -> None:
        self.images = images
        self._parts = parts

    def wait(self) -> dict[int, str]:
        """Wait for the images.

        Returns:
            Those that cannot be decoded, or whose box is not within the image: index -> reason.

        Raises:
            CancelledError: the decoder was closed meanwhile.
        """
        bad: dict[int, str] = {}
        for part in self._parts:
            bad |= part.result()
        return bad


class Decoder:
    """Decodes, crops, resizes (bicubic with antialias) and flips batches.

    Pixels depend on the bytes and boxes alone, not on the number of threads, the batch, or what was decoded before.

    Args:
        config: image_size.
        device: `cpu`, or `mixed` for nvJPEG on a GPU.
        num_threads: CPUs that are kept busy.
        crops_per_image: boxes that are cut from each file, which is decoded once.
        max_batch_size: images that a pipeline takes at a time. On a CPU there are `num_threads + 1` pipelines, which
            bounds the memory for decoded crops.
        device_id: the GPU, for `mixed`.
        pin_memory: put the images of a CPU where a GPU can copy them from by itself.
    """

    def __init__(
        self,
        config: AugmentConfig,
        *,
        device: Literal["cpu", "mixed"],
        num_threads: int,
        crops_per_image: int = 1,
        max_batch_size: int = MAX_BATCH_SIZE,
        device_id: int | None = None,
        pin_memory: bool = False,
    ) -> None:
        height, width = config.image_size
        self._shape, self._crops_per_image = (3, height, width), crops_per_image
        self._pin_memory = pin_memory
        mixed = device == "mixed"
        self._device = torch.device("cuda", device_id or 0) if mixed else torch.device("cpu")
        self._max_batch_size = max_batch_size
        self._num_parts = 1 if mixed else num_threads  # of a small batch, so that it keeps all threads busy
        # One more than CPUs: while one waits for the interpreter's lock, another one decodes.
        num_lanes = 1 if mixed else num_threads + 1

        def build(batch_size: int) -> Any:
            if mixed:
                return mixed_pipeline(
                    device_id or 0,
                    num_threads=num_threads,
                    max_batch_size=batch_size,
                    image_size=config.image_size,
                    crops_per_image=crops_per_image,
                )
            return crop_pipeline(num_threads=1, max_batch_size=batch_size)

        self._lanes = [_Lane(build, self._max_batch_size, mixed=mixed) for _ in range(num_lanes)]
        self._idle: queue.SimpleQueue[_Lane] = queue.SimpleQueue()
        for lane in self._lanes:
            self._idle.put(lane)
        self._pool = ThreadPoolExecutor(num_lanes, "tarmac-decode", _stay_on_this_thread, (ThreadpoolController(),))
        for _ in self._lanes:  # side by side, while the first bytes are read
            self._pool.submit(self._on_a_lane, _Lane.build)

    def start(self, encoded: Sequence[Encoded], crops: Crops) -> Decoding:
        """Start to decode a batch; batches are worked off in the order in which they were started.

        Args:
            encoded: B files: JPEG, PNG, WebP and whatever else nvImageCodec reads; grey and CMYK become RGB.
            crops: boxes within the stored images, `crops_per_image` of each file side by side.

        Returns:
            Its images, one a box, are uint8 in `torch.channels_last` memory format, on the GPU if `mixed`.

        Raises:
            RuntimeError: the decoder is closed.
        """
        images = torch.empty(
            (len(encoded) * self._crops_per_image, *self._shape),
            dtype=torch.uint8,
            device=self._device,
            memory_format=torch.channels_last,
            pin_memory=self._pin_memory,
        )
        by_file = images.view(-1, self._crops_per_image, *self._shape) if len(encoded) else images
        parts = []
        size = min(-(-len(encoded) // self._num_parts), self._max_batch_size)
        for first in range(0, len(encoded), max(size, 1)):
            rows = np.arange(first, min(first + size, len(encoded)))
            parts.append(self._pool.submit(self._on_a_lane, _Lane.decode, encoded, crops, rows, by_file))
        return Decoding(images, parts)

    def decode(self, encoded: Sequence[Encoded], crops: Crops) -> UInt8[Tensor, "B 3 H W"]:
        """Decode a batch: `start` and `wait` in one.

        Raises:
            DecodeError: some cannot be decoded, or a box is not within its image; the decoder stays usable.
        """
        decoding = self.start(encoded, crops)
        if bad := decoding.wait():
            raise DecodeError(list(bad), list(bad.values()))
        return decoding.images

    @property
    def busy_s(self) -> float:
        """Seconds that its threads worked so far, summed over them."""
        return sum(lane.busy_s for lane in self._lanes)

    def close(self) -> None:
        """Stop the threads; batches that are not decoded yet will not be."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _on_a_lane(self, work: Callable[..., dict[int, str]], *args: Any) -> dict[int, str]:
        lane = self._idle.get_nowait()  # there are as many as threads
        started = time.perf_counter()
        try:
            return work(lane, *args)
        finally:
            lane.busy_s += time.perf_counter() - started
            self._idle.put(lane)


class _Lane:
    """One DALI pipeline, for one thread at a time."""

    def __init__(self, build: Callable[[int], Any], max_batch_size: int, *, mixed: bool) -> None:
        self._build, self._max_batch_size, self._mixed = build, max_batch_size, mixed
        self._pipe: Any = None
        self.busy_s = 0.0

    def build(self) -> dict[int, str]:
        """Have a pipeline before it is needed."""
        if self._pipe is None:
            self._pipe = self._build(self._max_batch_size)
            self._pipe.build()
        return {}

    def decode(
        self, encoded: Sequence[Encoded], crops: Crops, rows: npt.NDArray[np.int64], images: Tensor
    ) -> dict[int, str]:
        """Fill `rows` of `images`; returns those that cannot be decoded, and why."""
        self.build()
        try:
            outputs = self._run(encoded, crops, rows, images.shape[1])
        except RuntimeError as error:
            self._pipe = None  # a failed pipeline is dead
            if len(rows) == 1:
                return {int(rows[0]): _reason(error)}
            return self._decode_singly(encoded, crops, rows, images, error)
        pixels = images[rows[0] : rows[-1] + 1].permute(0, 1, 3, 4, 2)  # [n, crops, H, W, 3], contiguous
        if self._mixed:
            for number, output in enumerate(outputs):
                _copy_from_dali(output, pixels[:, number])
        else:
            for at, images_of_file in enumerate(pixels.numpy()):
                _cut(np.asarray(outputs[0][at]), crops, int(rows[at]), images_of_file)
        return {}

    def _run(
        self, encoded: Sequence[Encoded], crops: Crops, rows: npt.NDArray[np.int64], crops_per_image: int
    ) -> tuple[Any, ...]:
        pipe = self._pipe
        boxes = _rows_of(crops, rows, crops_per_image)  # of [n, crops]
        pipe.feed_input("encoded", [np.frombuffer(encoded[row], np.uint8) for row in rows])
        if not self._mixed:
            top, left, height, width = _bounds(boxes)
            pipe.feed_input("start", np.stack([top, left], axis=1).astype(np.int32))
            pipe.feed_input("shape", np.stack([height, width], axis=1).astype(np.int32))
            return tuple(pipe.run())
        for number in range(crops_per_image):
            start, shape = (
                np.stack([column[:, number] for column in pair], axis=1).astype(np.int32)
                for pair in ((boxes.top, boxes.left), (boxes.height, boxes.width))
            )
            pipe.feed_input(f"start{number}", start)
            pipe.feed_input(f"shape{number}", shape)
            pipe.feed_input(f"flip{number}", boxes.flip[:, number].astype(np.int32))
        return tuple(pipe.run())

    def _decode_singly(
        self,
        encoded: Sequence[Encoded],
        crops: Crops,
        rows: npt.NDArray[np.int64],
        images: Tensor,
        error: RuntimeError,
    ) -> dict[int, str]:
        """Find out which rows of a run that failed with `error` fail alone."""
        single = _Lane(self._build, 1, mixed=self._mixed)
        bad: dict[int, str] = {}
        for row in rows:
            bad |= single.decode(encoded, crops, np.array([row]), images)
        if not bad:
            raise error
        return bad


def resize_into(image: npt.NDArray[np.uint8], crop: npt.NDArray[np.uint8], *, flip: bool) -> None:
    """Resize `crop` [h, w, 3] into `image` [H, W, 3], bicubic with antialias, and mirror it if `flip`.

    Within 1 of PIL's bicubic with the horizontal pass first.
    """
    # [1, 3, h, w] in channels_last and so [1, 3, H, W]: torch's fast uint8 kernel neither unpacks nor packs.
    pixels = torch.from_numpy(crop)[None].permute(0, 3, 1, 2)
    resized = F.interpolate(pixels, size=image.shape[:2], mode="bicubic", antialias=True)
    if flip:
        resized = torch.flip(resized, (3,))
    np.copyto(image, resized[0].permute(1, 2, 0).numpy())


def _stay_on_this_thread(openmp: ThreadpoolController) -> None:
    """Let torch's operators start no threads for what this thread asks of them: ours are as many as there are CPUs."""
    torch.get_num_threads()  # torch's number for this thread is set by now, and does not undo the next line
    openmp.limit(limits=1, user_api="openmp")


def _rows_of(crops: Crops, rows: npt.NDArray[np.int64], crops_per_image: int) -> Crops:
    """The boxes of some files, each column [n, crops]."""
    return Crops(*(getattr(crops, field.name).reshape(-1, crops_per_image)[rows] for field in fields(Crops)))


def _bounds(boxes: Crops) -> tuple[npt.NDArray[np.int64], ...]:
    """Top, left, height and width [n] of what all boxes of a file lie in: decoded once, it is cut for each."""
    top, left = boxes.top.min(axis=1), boxes.left.min(axis=1)
    return top, left, (boxes.top + boxes.height).max(axis=1) - top, (boxes.left + boxes.width).max(axis=1) - left


def _cut(decoded: npt.NDArray[np.uint8], crops: Crops, row: int, images: npt.NDArray[np.uint8]) -> None:
    """Fill `images` [crops, H, W, 3] from the part [h, w, 3] of file `row` that all its boxes lie in."""
    num = len(images)
    if num == 1:
        resize_into(images[0], decoded, flip=bool(crops.flip[row]))
        return
    boxes = slice(row * num, (row + 1) * num)
    tops, lefts = crops.top[boxes] - crops.top[boxes].min(), crops.left[boxes] - crops.left[boxes].min()
    for image, top, left, height, width, flip in zip(
        images, tops, lefts, crops.height[boxes], crops.width[boxes], crops.flip[boxes], strict=True
    ):
        crop = np.ascontiguousarray(decoded[top : top + height, left : left + width])
        resize_into(image, crop, flip=bool(flip))


def _copy_from_dali(outputs: Any, images: Tensor) -> None:
    images.copy_(from_dlpack(outputs.as_tensor()))
    # DALI may reuse the buffer once `outputs` is dropped.
    torch.cuda.current_stream(images.device).synchronize()


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
