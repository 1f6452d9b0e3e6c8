"""What one graphics card makes of the whole way from files to trained models: `python -m benchmarks.gpu`.

runner      a section in a process of its own, with a hard end      clock       times, kernels and memory of any device
shapes      models, vision towers, their floating-point operations  world       pictures, rows, features: made when asked for
ceilings, encoder, extraction, store, pretrain, sft, generation     the sections, a file each
sides, plain   what takes turns in training                         pairs       one language model with one encoder, measured
"""
