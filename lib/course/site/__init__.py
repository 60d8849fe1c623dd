"""The course as a site to read: `make site`.

pages writes what Sphinx reads, from the notebooks, the pages in Markdown and the
docstrings of lib/; conf.py says how Sphinx sets it; links follows what it made from page
to page. No notebook is run: figures and numbers are those of solutions/*.ipynb.
"""
