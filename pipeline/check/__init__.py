"""What a data set holds and what is wrong with it, before anything is computed: `python -m pipeline.check`.

survey      one pass over a data set's rows, in constant memory, into a `Report`
pictures    every distinct picture read, its header checked, decoded
lengths     rows as the language model will see them: token counts, what is cut or refused
costs       features on disk and extraction time
terminal    a report for the terminal; `page` one HTML file of all reports
"""
