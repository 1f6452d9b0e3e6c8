"""A trained model and pictures in, answers out: `python -m pipeline.chat` in a terminal, `python -m pipeline.web` in a browser.

assistant   the model put to use          options   what both commands take          web   the page
"""
