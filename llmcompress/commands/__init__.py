"""The verbs of the command line, a file for each group; `cli.py` lists them. A verb builds a recipe and runs it."""
