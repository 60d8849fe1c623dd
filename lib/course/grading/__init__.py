"""Grade a folder of notebooks, so that no accident costs more than its exercise.

One submission's way, in the order to read:

    files.py         what is in a folder or an archive; nothing in it is executed
    submissions.py   whose it is, and which of several counts
    grader.py        its cells go to a worker, with inputs, an exercise at a time
    worker.py        executes what the answer needs, calls it, and sends what came out
    wire.py          what crosses between the two: plain data, capped
    grader.py        compares that with the library's outputs, and gives points
    results.py       keeps a file for the student, and a row of the table
    report.py        the pages

sandbox.py says what a worker may touch; __main__.py is the command.
"""
