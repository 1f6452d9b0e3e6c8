"""A picture in, patch features [P, Dv] out: from the frozen encoder, or from the store that has kept what it gave.

encoder      the frozen vision tower and its pixels          store        rows of patch features on disk
distinct     the distinct pictures of data sets              decoding     pictures decoded by worker processes
resampling   which Pillow resizes them
shard_plan   which shards and rows are new                extraction   every picture, once, into the store
sources      what training asks for features: the store or the live encoder
`python -m pipeline.features verify|info|show` looks after a store.
"""

from pipeline.features.decoding import ImageFile
from pipeline.features.distinct import distinct_images
from pipeline.features.encoder.encoder import Encoder
from pipeline.features.encoder.fused import (
    FusedEncoder,
    common_tokens,
    describe_encoders,
    join_encoders,
    load_encoder,
    load_member,
    shape_of,
)
from pipeline.features.encoder.preprocess import Preprocessor
from pipeline.features.encoder.tower import TOWERS, side_of, tower_class
from pipeline.features.extraction import Extraction, Processes, extract
from pipeline.features.resampling import KEY as RESAMPLING
from pipeline.features.resampling import warn_of_resampling
from pipeline.features.sources import FeatureSource, LiveFeatures, NoFeatures, stored_features
from pipeline.features.store.row_format import Float16Format, Int8Format, RowFormat
from pipeline.features.store.shards import row_bytes, write_shard
from pipeline.features.store.store import FeatureStore, member_folders, write_index

__all__ = [
    "RESAMPLING",
    "TOWERS",
    "Encoder",
    "Extraction",
    "FeatureSource",
    "FeatureStore",
    "Float16Format",
    "FusedEncoder",
    "ImageFile",
    "Int8Format",
    "LiveFeatures",
    "NoFeatures",
    "Preprocessor",
    "Processes",
    "RowFormat",
    "common_tokens",
    "describe_encoders",
    "distinct_images",
    "extract",
    "join_encoders",
    "load_encoder",
    "load_member",
    "member_folders",
    "row_bytes",
    "shape_of",
    "side_of",
    "stored_features",
    "tower_class",
    "warn_of_resampling",
    "write_index",
    "write_shard",
]
