"""A trained model on public benchmarks: local copies in, every answer kept and figures out, the blind control beside each.

tasks       a benchmark an entry: split, columns, prompt, metric    answers    what an answer is worth, as lmms-eval defines it
benchmark   the files of a task, its questions and pictures         figures    what all answers of a task come to
scoring     questions asked in parts, pictures encoded once         command    the command line, and a stage of score/dvc.yaml
"""
