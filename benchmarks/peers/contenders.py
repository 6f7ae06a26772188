"""The rows of the table: who takes part, and how each is used."""

from __future__ import annotations

from benchmarks.peers.contender import Contender

FLOATS, BYTES = "float32, normalised", "uint8"

CONTENDERS = (
    Contender(
        name="torchvision, PIL",
        output=FLOATS,
        how="ImageFolder, PIL decode and transforms, DataLoader: the official MAE recipe",
        open="torch_loaders:pil_folder",
    ),
    Contender(
        name="torchvision v2, tensors",
        output=FLOATS,
        how="ImageFolder, decode_jpeg, v2 transforms, DataLoader",
        open="torch_loaders:v2_folder",
        first_batch="torch_loaders:stateful_first_batch",
    ),
    Contender(
        name="torchvision v2, uint8 out",
        output=BYTES,
        how="the same without ToDtype and Normalize, as ours",
        open="torch_loaders:v2_folder_uint8",
    ),
    Contender(
        name="webdataset + v2",
        output=FLOATS,
        how="shuffle(1000), decode_jpeg, v2 transforms, batched in the workers of a WebLoader",
        open="torch_loaders:webdataset_tars",
        first_batch="torch_loaders:webdataset_first_batch",
    ),
    Contender(
        name="mosaicml-streaming",
        output=FLOATS,
        how="MDS `jpeg` column (PIL), torchvision transforms, StreamingDataLoader",
        open="streaming_loaders:mosaic",
        first_batch="streaming_loaders:mosaic_first_batch",
        form="mds",
    ),
    Contender(
        name="litdata",
        output=FLOATS,
        how="JPEG chunks (decoded to tensors), v2 transforms, StreamingDataLoader",
        open="streaming_loaders:litdata_epoch",
        first_batch="streaming_loaders:litdata_first_batch",
        form="litdata",
    ),
    Contender(
        name="SPDL",
        output=BYTES,
        how="FFmpeg decode and filters (crop, bicubic scale, hflip) in a pipeline of threads",
        open="spdl_loader:spdl_images",
        needs_ffmpeg=True,
    ),
    Contender(
        name="DALI webdataset reader",
        output=FLOATS,
        how="fn.readers.webdataset, decoders.image_random_crop, cubic resize, crop_mirror_normalize",
        open="dali_loaders:webdataset_reader",
    ),
    Contender(
        name="limit: ROI decode alone",
        output="crops",
        how="DALI decoders.image_slice of JPEGs in memory, nothing else",
        open="dali_loaders:roi_decode",
        kind="limit",
    ),
    Contender(
        name="tarmac, local disk",
        output=BYTES,
        how="Loader, 8 lanes; masks drawn and crc checked too",
        open="ours:local",
        first_batch="ours:first_batch",
        kind="ours",
    ),
    Contender(
        name="tarmac, S3",
        output=BYTES,
        how="the same from an S3 server on the same cores; its CPU time is left out",
        open="ours:from_s3",
        kind="ours",
        needs_s3=True,
    ),
    Contender(
        name="tarmac, S3, cached",
        output=BYTES,
        how="the same with all of it in the node's cache",
        open="ours:from_s3_cached",
        kind="ours",
        needs_s3=True,
    ),
)
