"""A project set up for its user's own data and models: `glance new` and `glance use` write params.yaml and dvc.yaml.

files    params.yaml and dvc.yaml, comments and order kept     models   folders of models as dependencies in dvc.yaml
plan     what a user's files make of params.yaml               new, use  the two commands
Whatever they write can be written by hand, and is shown before.
"""
