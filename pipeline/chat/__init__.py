"""A trained model and pictures in, answers out: `python -m pipeline.chat` in a terminal, `python -m pipeline.web` in a browser.

assistant    the model put to use                    options      what both commands take
terminal     a talk, line by line                    many         a folder or a file of questions
paths        pictures as a person names them         interrupts   what Ctrl-C does
thumbnail    a picture in half blocks                transcript   a talk on disk
web          the page served      page         what is on it      visitors     whose talk is whose      guard   what may reach it
"""
