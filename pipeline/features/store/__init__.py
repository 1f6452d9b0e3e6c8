"""Image hashes in, stored patch features out: a folder of shards, each an HDF5 file that is written once.

store        rows by image hash over all shards          shards       one file, written and read
row_format   a row's form on disk: float16 or int8       mapping      many files as one array          buffers   host memory
"""
