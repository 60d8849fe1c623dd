"""The course as a site to read: `make site`.

pages writes what Sphinx reads, from the notebooks, the pages in Markdown and the
docstrings of lib/; conf.py says how Sphinx sets it; links follows every link of what it
made. Nothing is executed: figures and numbers are those of solutions/*.ipynb.
"""
